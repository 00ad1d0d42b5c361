"""Teacher + training tokens -> the teacher, trained a little on them before it teaches."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("correct_teacher", __doc__)

if __name__ == "__main__":
    main()
