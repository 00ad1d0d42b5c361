"""Runs, finished or not -> one table of quality against size, speed and tokens, and what differed in their settings."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.compare import CompareRunsConfig
from compactlm_nemo.config.load import COMPARE_RUNS, to_yaml


def compare(config: CompareRunsConfig) -> None:
    """Compare, or in a dry run look at the folders and show the settings."""
    from rich.console import Console

    from compactlm_nemo.workflow.compare import compare_runs

    compare_runs(config, Console())
    if config.dry_run:
        print(to_yaml(config), end="")


main = recipe_root(COMPARE_RUNS, compare, __doc__)

if __name__ == "__main__":
    main()
