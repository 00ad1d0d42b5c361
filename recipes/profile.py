"""Exported student, and the teacher beside it -> speed, memory and size where they will be served."""

from compactlm_nemo.config.command import recipe
from compactlm_nemo.stages.profile import with_engines
from compactlm_nemo.workflow.runner import run_stages

main = recipe(lambda config: run_stages(with_engines(config), only="profile"), __doc__)

if __name__ == "__main__":
    main()
