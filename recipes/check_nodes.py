"""All ranks meet, and what differs between their nodes is told: GPUs, versions, code, disk, clocks."""

from compactlm_nemo.config.command import recipe
from compactlm_nemo.workflow.check_nodes import check_nodes

main = recipe(check_nodes, __doc__, leaves_runs=False)

if __name__ == "__main__":
    main()
