"""Teacher -> documents that it writes itself."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("generate", __doc__)

if __name__ == "__main__":
    main()
