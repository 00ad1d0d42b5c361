"""Iterative pruning: score and prune in rounds.count rounds, with rounds.steps of distillation between them."""

from compactlm_nemo.config.command import recipe
from compactlm_nemo.workflow.rounds import run_rounds

main = recipe(run_rounds, __doc__)

if __name__ == "__main__":
    main()
