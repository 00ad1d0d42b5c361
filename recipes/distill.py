"""Teacher + student + tokens -> trained student."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("distill", __doc__)

if __name__ == "__main__":
    main()
