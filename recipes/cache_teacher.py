"""Teacher + training tokens -> stored targets, for distill.teacher=stored."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("cache_teacher", __doc__)

if __name__ == "__main__":
    main()
