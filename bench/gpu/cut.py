"""The cut of a teacher to the experiment's student: plainly, with refitted maps, and the order in which units leave.

The teacher has few layers, whose weights lie on the CPU as a checkpoint's do; the seconds of a whole model are those of
its layers. Scores and second moments come from a scoring pass over random tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.gpu import clock, models
from bench.gpu.record import Record
from compactlm_nemo.config.schema import Config
from compactlm_nemo.importance.activations import collect
from compactlm_nemo.importance.moments import MomentCollector, MomentSource, save_moments
from compactlm_nemo.importance.names import DEPTH
from compactlm_nemo.importance.score_state import ScoreState
from compactlm_nemo.models.build import ModelChunks, ParameterSource, fill, global_names
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.elimination import eliminate_layer
from compactlm_nemo.pruning.plan import Plan, make_plan
from compactlm_nemo.pruning.reconstruct import RefittedWriters
from compactlm_nemo.pruning.residual_stream import HiddenCut, NormedStream, RefittedSelection, Selection
from compactlm_nemo.stages.context import Run

LAYERS = 2
SAMPLES = 4


def measure(record: Record, *, dry: bool) -> None:
    """Record the seconds of each way; one after another, as far as time allows."""
    config = models.settings(f"score.samples={SAMPLES}", "score.micro_batch=1", dry=dry)
    teacher, student = (dims.with_shape(layers=LAYERS) for dims in models.shapes(config, dry=dry))
    with launched(config.parallel, seed=1) as mesh, tempfile.TemporaryDirectory() as folder:
        run = models.run_on(config, mesh)
        chunks = models.random_model(run, teacher).eval()
        scores, moments = _measured(chunks, config, Path(folder))
        weights = {name: parameter.detach().cpu() for name, parameter in global_names(chunks)}
        del chunks
        plan = make_plan(teacher, student, scores)
        cut = _Cut(run, teacher, student, plan, weights.__getitem__, moments, config.prune.ridge)
        label = f"cut of {LAYERS} layers"
        record.figure(f"{label}, plain", clock.seconds(cut.plain), "s")
        record.figure(f"{label}, refitted", clock.seconds(cut.refitted), "s")
        record.figure("order in which the units of one layer leave", clock.seconds(cut.eliminated), "s")


class _Cut:
    """A cut of one teacher to one student, as the prune stage makes it."""

    def __init__(
        self,
        run: Run,
        teacher: Dims,
        student: Dims,
        plan: Plan,
        source: ParameterSource,
        moments: MomentSource,
        ridge: float,
    ) -> None:
        self.run, self.teacher, self.student, self.plan = run, teacher, student, plan
        self.source, self.moments, self.ridge = source, moments, ridge

    def plain(self) -> None:
        """Keep the best units and change nothing else."""
        self._fill(self.source, Selection(self.plan.hidden))

    def refitted(self) -> None:
        """Refit every map that loses inputs."""
        whole = self.moments.whole
        writers = RefittedWriters(self.teacher, self.plan, self.source, whole, self.ridge, {})
        stream = NormedStream(whole, self.moments.tokens, self.source, one_plus=self.teacher.norm_1p)
        self._fill(writers, RefittedSelection(self.plan.hidden, stream, self.ridge, is_rms=True))

    def eliminated(self) -> None:
        """Find the order in which heads and neurons of one layer leave by the error that refitting leaves."""
        eliminate_layer(0, self.teacher, self.source, self.moments.whole, self.ridge)

    def _fill(self, source: ParameterSource, hidden: HiddenCut) -> None:
        narrowed = NarrowedSource(CutSource(self.teacher, self.plan, source), self.teacher, self.plan.layers, hidden)
        chunks = self.run.build(self.student)
        fill(chunks, narrowed, self.run.config.model.vocab_multiple)
        if not all(bool(parameter.isfinite().all()) for parameter in chunks.parameters()):
            raise FloatingPointError("a cut weight is not finite")


def _measured(chunks: ModelChunks, config: Config, folder: Path) -> tuple[dict[str, Tensor], MomentSource]:
    """Return the scores that decide the plan, and second moments, from one pass."""
    windows_NS = models.random_tokens(chunks.dims, SAMPLES, config.data.sequence_length)
    collector, state = MomentCollector(chunks), ScoreState()
    state.add(collect(chunks, windows_NS, config.score, lambda _: None, collector.on_batch), SAMPLES)
    save_moments(folder / "moments", collector.reduce(), chunks.mesh, windows_NS.numel())
    vectors: dict[str, Any] = state.rankings(chunks.dims, config.score)
    prefix = f"{config.score.width[0].name}."
    scores = {name.removeprefix(prefix): x for name, x in vectors.items() if name.startswith(prefix)}
    return scores | {DEPTH: vectors[f"{DEPTH}.{config.score.depth[0].name}"]}, MomentSource(folder / "moments")
