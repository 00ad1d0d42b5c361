"""Candidates x (prune + short distillation) -> a ranking, one after another or as a Slurm array (rank.only=INDEX)."""

from compactlm_nemo.config.command import recipe
from compactlm_nemo.workflow.rank import rank

main = recipe(rank, __doc__)

if __name__ == "__main__":
    main()
