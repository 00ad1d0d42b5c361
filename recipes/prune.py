"""Teacher + scores + one candidate -> student."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("prune", __doc__)

if __name__ == "__main__":
    main()
