"""A finished run and a file of limits (`gate=NAME`) -> PASS or FAIL for each limit; exit code 3 where one fails."""

from compactlm_nemo.config.command import recipe_root
from compactlm_nemo.config.gate import GateRunConfig
from compactlm_nemo.config.load import GATE


def judge_run(config: GateRunConfig) -> None:
    """Judge the run, on the main console."""
    from rich.console import Console

    from compactlm_nemo.report.gate import gate

    gate(config, Console())


main = recipe_root(GATE, judge_run, __doc__)

if __name__ == "__main__":
    main()
