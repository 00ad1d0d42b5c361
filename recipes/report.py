"""All results of a run -> report.html, report.md and plots."""

from compactlm_nemo.workflow.runner import stage_recipe

main = stage_recipe("report", __doc__)

if __name__ == "__main__":
    main()
