"""Teacher + training tokens -> stored targets, for distill.teacher=stored."""

from compactlm_nemo.config.load import recipe
from compactlm_nemo.workflow.runner import run_stages

main = recipe(lambda config: run_stages(config, only="cache_teacher"), __doc__)

if __name__ == "__main__":
    main()
