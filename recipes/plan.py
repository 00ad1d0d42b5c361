"""A run and a cluster -> what every stage needs, takes and costs, and which layouts there are; without a GPU."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.load import PLAN
from compactlm_nemo.config.schema import Config


def _plan(config: Config) -> None:
    from compactlm_nemo.workflow.plan import plan

    plan(config)


main = recipe_root(PLAN, _plan, __doc__)

if __name__ == "__main__":
    main()
