"""LM loss, size and speed of teacher, pruned and distilled model."""

from compactlm_nemo.config.load import recipe
from compactlm_nemo.workflow.runner import run_stages

main = recipe(lambda config: run_stages(config, only="evaluate"), __doc__)

if __name__ == "__main__":
    main()
