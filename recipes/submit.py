"""A recipe and its settings -> jobs of Slurm, after the recipe's own checks: RECIPE nodes=N time=HH:MM:SS site=NAME."""

import sys
from functools import partial

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.load import SUBMIT
from compactlm_nemo.workflow.submit import split_words, submit


def main() -> None:
    """Give Hydra the words that are about the job, and the others to the recipe."""
    sys.argv[1:], rest = split_words(sys.argv[1:])
    recipe_root(SUBMIT, partial(submit, words=rest), __doc__)()


if __name__ == "__main__":
    main()
