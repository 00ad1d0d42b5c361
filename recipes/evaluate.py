"""LM loss, size and speed of teacher, pruned and distilled model."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("evaluate", __doc__)

if __name__ == "__main__":
    main()
