"""One pass of calibration windows through the teacher, part by part, for the score stage.

Progress lives in `progress/score` until the stage is complete. Every `score.save_every` samples the states of all
ranks are merged and saved; a killed run goes on from the last save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from compactlm_nemo.artifacts import remove_sealed, sealed
from compactlm_nemo.config.score import DepthMetric, ScoreConfig
from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.importance.accumulator import StateKey
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.aggregators import State
from compactlm_nemo.importance.moments import MomentCollector, save_moments
from compactlm_nemo.importance.score_state import STATE, ScoreState
from compactlm_nemo.importance.scores import load_scores
from compactlm_nemo.importance.taylor import Gradients, taylor_scores
from compactlm_nemo.losses.linear_ce import linear_ce_sum
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import barrier, broadcast_object
from compactlm_nemo.parallel.interruption import stop_if_asked
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import launch_rank
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.stages.context import Run
from compactlm_nemo.training.optimizer import wrap_data_parallel

MOMENTS = "moments"
"""Subfolder of the score stage with the second moments."""


TAYLOR = "taylor"
"""What progress of the gradients is kept under."""


@dataclass
class Scoring:
    """A scoring run under way."""

    run: Run
    teacher: ModelChunks
    dims: Dims
    windows_NS: Tensor
    """The same on every rank."""
    running: ScoreState
    """What has been measured; of use on the main rank only."""
    state: Path
    """Folder of the progress."""

    @property
    def cfg(self) -> ScoreConfig:
        return self.run.config.score

    def progress(self, label: str, samples: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a bar over the samples."""
        return progress_bar(label, samples, self.windows_NS.shape[1])

    def measure_activations(self, folder: Path) -> None:
        """Run the samples not yet measured once: every width metric, block importance, second moments."""
        cfg = self.cfg
        if not (DepthMetric.bi in cfg.depth or any(metric.pair for metric in cfg.width) or cfg.second_moments):
            return
        done, total = broadcast_object(self.running.samples), len(self.windows_NS)
        moments = None
        if cfg.second_moments:
            moments = MomentCollector(self.teacher, experts=cfg.expert_moments)
        if moments and done:
            moments.load_state(self._load_rank(MOMENTS, done))
        on_batch = moments.on_batch if moments else lambda counted, counts_SB: None
        with self.progress("score", total - done) as advance:
            while done < total:
                part_NS = self.windows_NS[done : done + cfg.save_every]
                states = collect(self.teacher, part_NS, cfg, advance, on_batch)
                if moments:
                    self._save_rank(MOMENTS, moments.state(), done, done + len(part_NS))
                stop = self._take_in(states, len(part_NS))
                done += len(part_NS)
                if stop:
                    break
                stop_if_asked(f"{done} of {total} samples are scored")
        if moments:
            tokens = int(counts_of(self.windows_NS[:done]).sum())
            save_moments(folder / MOMENTS, moments.reduce(), self.run.mesh, tokens)

    def _take_in(self, states: dict[StateKey, State], samples: int) -> bool:
        """Merge and save; whether the rankings have settled, on every rank."""
        stop, running = False, self.running
        with main_rank_writes() as writes:
            if writes:
                before = running.rankings(self.dims, self.cfg) if running.samples else {}
                running.add(states, samples)
                running.check_finite(self.dims)
                stop = running.has_converged(before, running.rankings(self.dims, self.cfg), self.cfg)
                self.keep()
        return broadcast_object(stop)

    def keep(self) -> None:
        """Save what has been measured, on the main rank; a kill leaves the old or the new state."""
        with sealed(self.state / STATE) as path:
            self.running.save(path)

    def _rank_file(self, kind: str, samples: int) -> Path:
        return self.state / f"{kind}_{samples}_rank_{launch_rank()}.safetensors"

    def _load_rank(self, kind: str, samples: int) -> dict[str, Tensor]:
        """Return what `_save_rank` stored of this rank after so many samples."""
        path = self._rank_file(kind, samples)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; delete {self.state} to score anew.")
        return load_file(path)

    def _save_rank(self, kind: str, state: dict[str, Tensor], before: int, after: int) -> None:
        """Store what this rank alone has; the file that the saved states go with is there at every instant."""
        path = self._rank_file(kind, after)
        with sealed(path) as temporary:
            save_file({name: block.cpu() for name, block in state.items()}, temporary)
        barrier()
        for old in self.state.glob(f"{kind}_*_rank_{launch_rank()}.safetensors"):
            if old not in (self._rank_file(kind, before), path):
                remove_sealed(old)

    def taylor(self) -> dict[str, Tensor]:
        """Return first-order Taylor importance, on the main rank: one forward and backward pass over all samples."""

        def loss_sum(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor) -> Tensor:
            return linear_ce_sum(hidden_NH, self.teacher.head(), labels_N, mask_N)

        ddps = wrap_data_parallel(self.teacher, shard_gradients=False)
        gradients = Gradients(ddps, loss_sum, self.cfg.micro_batch)
        done, total = broadcast_object(self.running.summed.get(TAYLOR, 0)), len(self.windows_NS)
        if done:
            gradients.load_state(self._load_rank(TAYLOR, done))
        with self.progress(TAYLOR, total - done) as advance:
            while done < total:
                part_NS = self.windows_NS[done : done + self.cfg.save_every]
                gradients.add(part_NS, advance)
                self._save_rank(TAYLOR, gradients.state(), done, done + len(part_NS))
                done += len(part_NS)
                with main_rank_writes() as writes:
                    if writes:
                        self.running.summed[TAYLOR] = done
                        self.keep()
                stop_if_asked(f"gradients of {done} of {total} samples are kept")
        return taylor_scores(gradients)


def tokens_hash(windows_NS: Tensor) -> str:
    """Return SHA-256 of the calibration tokens as little-endian int64, sample after sample."""
    return hashlib.sha256(windows_NS.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def start_state(run: Run, state: Path, windows_NS: Tensor, metadata: dict[str, str]) -> ScoreState:
    """Return the state to go on from: that of an interrupted run, or of `score.start_from`; on the main rank."""
    running = ScoreState()
    with main_rank_writes() as writes:
        if writes:
            running = ScoreState.load(state / STATE)
            if not running.samples and run.config.score.start_from is not None:
                running = _finished(Path(run.config.score.start_from), run.config.score, windows_NS, metadata)
    return running


def _finished(folder: Path, cfg: ScoreConfig, windows_NS: Tensor, metadata: dict[str, str]) -> ScoreState:
    """Return the state of a finished stage, after a check that it is of the first of these windows."""
    old = load_scores(folder).metadata
    running = ScoreState.load(folder / STATE)
    if running.samples > cfg.samples:
        raise ConfigError(
            f"score.samples={cfg.samples} is less than the {running.samples} of score.start_from={folder}; raise it."
        )
    expected = metadata | {"calibration": tokens_hash(windows_NS[: running.samples])}
    differing = [name for name in expected if old.get(name) != expected[name]]
    if differing or not running.samples:
        raise ConfigError(
            f"score.start_from={folder} was measured with another {differing[0] if differing else 'version'}; it can "
            "be continued with the same model, texts, seed, sequence_length, mask_documents and score.neurons only."
        )
    needed = {metric.pair[1] for metric in cfg.width if metric.pair}
    measured = {agg for element, agg in running.states if not element.startswith("depth.")}
    if not needed <= measured:
        raise ConfigError(f"score.start_from={folder} lacks what score.width={[m.name for m in cfg.width]} needs.")
    return running
