"""Scores + budget -> ranked candidates."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("search", __doc__)

if __name__ == "__main__":
    main()
