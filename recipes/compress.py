"""The whole road: import, tokenize, score, search, prune, distill, evaluate, export, report. Skips what is done."""

from compactlm_nemo.config.load import recipe
from compactlm_nemo.stages import run_stages

main = recipe(lambda config: run_stages(config), __doc__)

if __name__ == "__main__":
    main()
