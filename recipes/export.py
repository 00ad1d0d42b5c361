"""Student -> Hugging Face folder."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("export", __doc__)

if __name__ == "__main__":
    main()
