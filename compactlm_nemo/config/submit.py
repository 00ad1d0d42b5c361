"""Settings of jobs: what a cluster is like, how long a recipe gets it; and of a run's status."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from compactlm_nemo.config.run import RunFolder
from compactlm_nemo.errors import require

TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
"""Minutes, or what Slurm reads: minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MOST_JOBS = 1000


@dataclass(kw_only=True)
class SiteConfig:
    """What only a cluster knows: a file of conf/site/ each, chosen by `site=NAME`."""

    partition: str | None = None
    """Partition; null is the cluster's own default."""
    account: str | None = None
    """Account that pays; null is the user's default."""
    gpus_per_node: int = 8
    """GPUs of a node, and ranks on it."""
    container: str | None = None
    """Image for the pyxis plugin, a .sqsh file or registry#name:tag; null runs on the host."""
    mounts: list[str] = field(default_factory=list)
    """Mounts of the container, source:target; the folder of the checkout is mounted in any case."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that the job loads on the host, in order."""
    python: str = "python"
    """Interpreter on the nodes, inside the container if there is one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, NCCL's for example; one that is exported already wins."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --qos=long or --cpus-per-task=96."""

    def __post_init__(self) -> None:
        require(self.gpus_per_node > 0, f"site.gpus_per_node={self.gpus_per_node} must be > 0, the ranks of a node.")
        for name in self.environment:
            require(NAME.fullmatch(name) is not None, f"site.environment.{name} is no name of a variable; correct it.")
        for option in self.options:
            require(option.startswith("-"), f"site.options={option} must begin with a dash, as --qos=long does.")
        words = [self.partition or "", self.account or "", self.container or "", self.python]
        words += [*self.mounts, *self.modules, *self.options, *self.environment.values()]
        for word in words:
            require(not set(word) & {"\n", "\0"}, f"site: {word!r} must be one line; remove the line break.")
        for module in self.modules:
            require(not re.search(r"\s", module), f"site.modules={module} must be one word each; give a list.")


@dataclass(kw_only=True)
class SubmitConfig:
    """Settings of `recipes.submit`; all other overrides are the recipe's, `nodes` among them."""

    time: str = "04:00:00"
    """Time limit, as Slurm writes it: hours:minutes:seconds, days-hours, or minutes."""
    chain: int = 1
    """Jobs that follow each other on one run, for runs longer than a job may be."""
    site: SiteConfig = field(default_factory=SiteConfig)
    """The cluster; site=NAME takes conf/site/NAME.yaml."""
    dry_run: bool = False
    """Check the recipe's settings, print the script that would submit, and exit 0."""

    def __post_init__(self) -> None:
        require(
            TIME.fullmatch(self.time) is not None,
            f"time={self.time} is no time limit of Slurm; write hours:minutes:seconds, as 04:00:00.",
        )
        require(0 < self.chain <= MOST_JOBS, f"chain={self.chain} must be in [1, {MOST_JOBS}]; 1 is a single job.")


@dataclass(kw_only=True)
class StatusConfig:
    """Settings of `recipes.status`, which reads a run and changes nothing."""

    run: RunFolder = field(default_factory=RunFolder)
