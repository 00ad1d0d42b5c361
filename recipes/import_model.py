"""Teacher folder or GGUF file -> Megatron distributed checkpoint."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("import_model", __doc__)

if __name__ == "__main__":
    main()
