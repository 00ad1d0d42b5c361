"""A run -> what is done and what is under way, who works there, its jobs, tokens, loss and time left."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.load import STATUS
from compactlm_nemo.workflow.status import status

main = recipe_root(STATUS, status, __doc__)

if __name__ == "__main__":
    main()
