"""A run, finished or not -> whether every file in it is as it was written; a line an artifact."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.load import VERIFY
from compactlm_nemo.workflow.verify import verify

main = recipe_root(VERIFY, verify, __doc__)

if __name__ == "__main__":
    main()
