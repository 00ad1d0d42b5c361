"""Teacher folder or GGUF file -> Megatron distributed checkpoint."""

from compactlm_nemo.config.load import recipe
from compactlm_nemo.workflow.runner import run_stages

main = recipe(lambda config: run_stages(config, only="import"), __doc__)

if __name__ == "__main__":
    main()
