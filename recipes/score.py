"""Teacher + calibration tokens -> importance scores."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("score", __doc__)

if __name__ == "__main__":
    main()
