"""The panels of docs/dashboards.md -> a saved workspace in a project at W&B."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.load import DASHBOARD
from compactlm_nemo.workflow.dashboard import save_dashboard

main = recipe_root(DASHBOARD, save_dashboard, __doc__)

if __name__ == "__main__":
    main()
