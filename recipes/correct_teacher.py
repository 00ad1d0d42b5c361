"""Teacher + training tokens -> the teacher, trained a little on them before it teaches."""

from compactlm_nemo.config.load import recipe
from compactlm_nemo.workflow.runner import run_stages

main = recipe(lambda config: run_stages(config, only="correct_teacher"), __doc__)

if __name__ == "__main__":
    main()
