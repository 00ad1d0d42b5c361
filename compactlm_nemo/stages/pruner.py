"""Students of any shape, built in memory on the run's mesh from its teacher, scores and second moments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compactlm_nemo.config.prune import BlockInputs, HeadCut, PruneConfig, Reconstruct, Stream
from compactlm_nemo.data.windows import Windows, calibration_windows
from compactlm_nemo.importance.moments import MomentSource
from compactlm_nemo.importance.names import HIDDEN
from compactlm_nemo.importance.scores import load_scores
from compactlm_nemo.models.build import ModelChunks, ParameterSource, fill
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import barrier, broadcast_object, gather_objects
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank, launch_rank, launch_world_size
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.pruning import elimination
from compactlm_nemo.pruning.block_distillation import BlockDistillation, BlockTraining, LayerStore
from compactlm_nemo.pruning.block_replacement import BlockReplacement, measure_replacements, removed_blocks
from compactlm_nemo.pruning.cut import CutSource, NarrowedSource
from compactlm_nemo.pruning.plan import Plan, make_plan
from compactlm_nemo.pruning.reconstruct import RefittedWriters
from compactlm_nemo.pruning.reconstruct_sequential import SequentialReconstruction
from compactlm_nemo.pruning.residual_stream import (
    HiddenCut,
    NormedStream,
    RefittedSelection,
    RotatedStream,
    Selection,
    stream_energy,
    stream_rotation,
)
from compactlm_nemo.search.predicted_loss import HIDDEN_ERROR
from compactlm_nemo.stages.context import Run, validation_loss
from compactlm_nemo.stages.score_pass import MOMENTS


@dataclass(frozen=True)
class Pruner:
    """Cuts the teacher of a run to students of any sizes."""

    run: Run

    @property
    def cfg(self) -> PruneConfig:
        return self.run.config.prune

    @cached_property
    def teacher(self) -> Dims:
        return self.run.dims("teacher")

    @cached_property
    def source(self) -> CheckpointSource:
        """The teacher's parameters."""
        return CheckpointSource(self.run.path("teacher"), self.teacher)

    @cached_property
    def moments(self) -> MomentSource | None:
        """Second moments; None where nothing is reconstructed."""
        if self.cfg.reconstruct is Reconstruct.none:
            return None
        return MomentSource(self.run.path("score") / MOMENTS)

    def eliminate_units(self, folder: Path) -> None:
        """Write the eliminations of all layers into `folder`; nothing without second moments. Collective."""
        moments = self.moments
        if moments is None:
            return
        layers = range(launch_rank(), self.teacher.num_layers, launch_world_size())
        tensors: dict[str, Tensor] = {}
        with progress_bar("eliminate", len(layers), 1) as advance:
            for layer in layers:
                tensors |= elimination.eliminate_layer(layer, self.teacher, self.source, moments.whole, self.cfg.ridge)
                advance(1)
        gathered = gather_objects(tensors)
        with main_rank_writes() as writes:
            if writes:
                merged = {name: x for part in gathered for name, x in part.items()}
                save_file(merged | {HIDDEN_ERROR: self._hidden_error()}, folder / elimination.FILE)
        barrier()

    def _hidden_error(self) -> Tensor:
        """Return what all normed streams lose without n channels or directions, a share, `[H + 1]`."""
        assert self.moments is not None
        stream, size = self._normed_stream(self.moments), self.teacher.hidden_size
        if self.cfg.hidden is Stream.rotate:
            energy_H = stream_rotation(self.teacher, list(range(self.teacher.num_layers)), size, stream).energy_H
        else:
            best_first = self.run.unit_scores()[HIDDEN].sort(descending=True, stable=True).indices
            energy_H = stream_energy(self.teacher, list(range(self.teacher.num_layers)), stream).diagonal()[best_first]
        lost = energy_H.flip(0).clamp(min=0).cumsum(0) / energy_H.clamp(min=0).sum()
        return torch.cat([lost.new_zeros(1), lost])

    def ranking(self, folder: Path) -> dict[str, Tensor]:
        """Return the scores that decide which units stay; `folder` is that of the search stage."""
        scores = self.run.unit_scores()
        if not self.cfg.by_error:
            return scores
        return elimination.ranking(
            load_file(folder / elimination.FILE), scores, [axis.name for axis in self.cfg.by_error]
        )

    def plan(self, student: Dims, folder: Path) -> Plan:
        """Return the plan of a student of these sizes; `folder` is that of the search stage."""
        merges = self.cfg.heads is HeadCut.merge
        return make_plan(self.teacher, student, self.ranking(folder), merge_heads=merges)

    def candidate_loss(self, student: Dims, folder: Path) -> float:
        """Return the zero-shot loss of a candidate, which is built in memory for it. Collective."""
        return validation_loss(self.run, self.student(student, self.plan(student, folder)), "candidate")

    def student(self, dims: Dims, plan: Plan) -> ModelChunks:
        """Return this rank's share of the student of these sizes, in evaluation mode. Collective."""
        dims = plan.student(self.teacher, dims)
        source: ParameterSource = self.source
        if self.moments is not None:
            replacements = self._replacements(plan)
            source = RefittedWriters(self.teacher, plan, source, self.moments.whole, self.cfg.ridge, replacements)
        hidden, wide_source = self._hidden_cut(plan), CutSource(self.teacher, plan, source)
        model = self.run.build(dims)
        vocab_multiple = self.run.config.model.vocab_multiple
        narrowed = NarrowedSource(wide_source, self.teacher, plan.layers, hidden)
        fill(model, narrowed, vocab_multiple, narrowed.tables)
        if self.cfg.sequential:
            self._refit_sequentially(model, dims, plan, hidden, wide_source)
        return model.eval()

    def _refit_sequentially(
        self, model: ModelChunks, dims: Dims, plan: Plan, hidden: HiddenCut, wide_source: ParameterSource
    ) -> None:
        walk = SequentialReconstruction(
            student=model,
            teacher=self.run.load("teacher").eval(),
            plan=plan,
            hidden=hidden,
            wide_source=wide_source,
            windows_NS=self.calibration,
            micro_batch=self.run.config.score.micro_batch,
            ridge=self.cfg.ridge,
        )
        with progress_bar("refit layer by layer", dims.num_layers, 1) as advance:
            walk.run(advance)

    def distill_blocks(
        self, model: ModelChunks, plan: Plan, windows_NS: Tensor, store: LayerStore | None = None
    ) -> dict[int, tuple[float, float]]:
        """Train each layer of a student by itself on `block_windows`; return each one's loss before and after.

        Collective.
        """
        cfg, config = self.cfg, self.run.config
        distillation = BlockDistillation(
            student=model,
            teacher=self.run.load("teacher").eval(),
            plan=plan,
            hidden=self._hidden_cut(plan),
            windows_NS=windows_NS,
            training=BlockTraining(
                lr=cfg.block_lr,
                passes=cfg.block_passes,
                batch=cfg.block_batch,
                micro_batch=config.score.micro_batch,
                seed=config.run.seed,
                from_teacher=cfg.block_inputs is BlockInputs.teacher,
            ),
            store=store,
        )
        with progress_bar("distil layer by layer", model.dims.num_layers, 1) as advance:
            distillation.run(advance)
        return distillation.losses

    def block_windows(self) -> Tensor:
        """Return the windows that layers are trained on, `[N, S]`, equal on every rank."""
        config, count = self.run.config, self.cfg.block_samples
        if count is None:
            return self.calibration
        windows = Windows(self.run.train_corpora(), config.data.sequence_length, config.run.seed)
        return torch.stack([windows.sample(i)[:-1] for i in range(count)]).to(device())

    def _replacements(self, plan: Plan) -> dict[int, BlockReplacement]:
        """Measure for every removed block how the MLP before the block can replace it. Collective."""
        blocks = removed_blocks(plan.layers, self.teacher.num_layers)
        if not blocks or self.teacher.num_experts or self.teacher.norm_after:
            return {}
        windows_NS = self.calibration
        with progress_bar("replace removed layers", len(windows_NS), windows_NS.shape[1]) as advance:
            return measure_replacements(
                self.run.load("teacher").eval(),
                windows_NS,
                blocks,
                micro_batch=self.run.config.score.micro_batch,
                progress=advance,
            )

    @cached_property
    def calibration(self) -> Tensor:
        """The windows that were scored, `[N, S]`, equal on every rank."""
        config = self.run.config
        samples = int(load_scores(self.run.path("score")).metadata["samples"])
        return calibration_windows(
            self.run.calibration_corpora(), samples, config.data.sequence_length, config.run.seed
        ).to(device())  # fmt: skip

    def _normed_stream(self, moments: MomentSource) -> NormedStream:
        return NormedStream(moments.whole, moments.tokens, self.source, one_plus=self.teacher.norm_1p)

    def _hidden_cut(self, plan: Plan) -> HiddenCut:
        """Return how the residual stream is narrowed."""
        if self.moments is None or len(plan.hidden) == self.teacher.hidden_size:
            return Selection(plan.hidden)
        stream = self._normed_stream(self.moments)
        if self.cfg.hidden is Stream.select:
            return RefittedSelection(plan.hidden, stream, self.cfg.ridge, is_rms=not self.teacher.layer_norm_1p)
        # One rank's eigenvectors serve all, as those of equal directions are not unique.
        rotation = broadcast_object(
            stream_rotation(self.teacher, plan.layers, len(plan.hidden), stream) if is_main_rank() else None
        )
        assert rotation is not None
        return RotatedStream(rotation, stream, self.cfg.ridge)
