"""Text corpora -> Megatron indexed token files."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("tokenize", __doc__)

if __name__ == "__main__":
    main()
