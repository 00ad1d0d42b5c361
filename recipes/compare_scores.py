"""Two scores files of one model -> how far their ranks agree, axis by axis and metric by metric."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.load import COMPARE, to_yaml


def compare_scores(config: CompareConfig) -> None:
    """Compare, or in a dry run check the files and show the settings."""
    from rich.console import Console

    from compactlm_nemo.report.compare_scores import compare

    compare(config, Console())
    if config.dry_run:
        print(to_yaml(config), end="")


main = recipe_root(COMPARE, compare_scores, __doc__)

if __name__ == "__main__":
    main()
