"""Sequential reconstruction refits each layer on what the pruned layers before it produce, towards the teacher.

The student, already cut and refitted, is refitted again from its first layer on. In layer j, which is layer i of the
teacher (and n the next one that stays), in this order:

    qkv     z W'^T -> W_i y         z the student's, y the teacher's normed stream; only where the stream is narrowed
    proj    x W'^T -> T(r_i) - h    x the heads' outputs, h the stream before the layer, r_i the teacher's after it
    fc1     as qkv, behind the second norm
    fc2     x W'^T -> T(h_n) - r    r the student's stream before its MLP, h_n the teacher's before layer n

by ridge regression from the present weight, ``W' = W + ((G + D)^-1 (B - G W^T))^T`` with G = sum x x^T and
B = sum x t^T; T takes the teacher's stream to the student's. The sums are over the tokens that count (`data.marks`),
for proj and fc2 with the weight 1 / mean(T(.)^2) and the target divided by the model's residual multiplier. Errors of
earlier layers are thus made up for where they can be.
Experts keep the refit on the tokens they were sent.

Teacher and student are walked together, layer by layer: of each, a rank holds the states of its tokens before the
present layer on its device, and the targets of that layer alone in host memory.

Shape suffixes: S sequence, B batch, N tokens, E inputs, O outputs, H and K hidden size of teacher and student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.models.build import ModelChunks, ParameterSource, tp_share
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share
from compactlm_nemo.models.taps import Taps, on_every_stage, whole_over_tp
from compactlm_nemo.parallel.collectives import all_gather, all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.pruning.layer_walk import LayerWalk, spans
from compactlm_nemo.pruning.least_squares import damped
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import HiddenCut

Targets = dict[tuple[str, int], Tensor]
"""(map, micro-batch) -> the teacher's stream, or its normed stream y, `[N, H]` in the model's dtype on the CPU."""


@dataclass(frozen=True, kw_only=True)
class SequentialReconstruction:
    """A walk over the student's layers, which `run` refits one after another."""

    student: ModelChunks
    teacher: ModelChunks
    plan: Plan
    hidden: HiddenCut
    wide_source: ParameterSource
    """The parameters of the student before the stream was narrowed: rows of readers over the teacher's channels."""
    windows_NS: Tensor
    micro_batch: int
    ridge: float

    @property
    def mesh(self) -> Mesh:
        return self.student.mesh

    @property
    def dims(self) -> Dims:
        return self.student.dims

    @property
    def teacher_dims(self) -> Dims:
        return self.teacher.dims

    @property
    def is_narrowed(self) -> bool:
        return self.dims.hidden_size < self.teacher_dims.hidden_size

    @torch.no_grad()
    def run(self, progress: Callable[[int], None]) -> None:
        """Refit the student in place; `progress` is called with 1 for each finished layer. Collective."""
        samples = DataParallelSamples(self.windows_NS, self.mesh, self.micro_batch)
        student, teacher = LayerWalk(self.student.eval(), samples), LayerWalk(self.teacher, samples)
        to_student = self.hidden.stream_map(self.windows_NS.device)
        first = 0
        for layer, (start, end) in enumerate(spans(self.plan.layers, self.teacher_dims)):
            targets = self._teacher_targets(teacher, first, start, end, keep=student.module(layer) is not None)
            for part in self._parts():
                self._fit(part, layer, student, targets, to_student)
            student.step(layer)
            first = end
            progress(1)

    def _parts(self) -> list[str]:
        attention = ["qkv", "proj"] if self.is_narrowed else ["proj"]
        if self.dims.num_experts:
            return attention
        return [*attention, "fc1", "fc2"] if self.is_narrowed else [*attention, "fc2"]

    def _fit(
        self,
        part: str,
        layer: int,
        student: LayerWalk,
        targets: Targets,
        to_student: Callable[[Tensor], Tensor],
    ) -> None:
        """Sum up over the tokens and write the refitted weight of one linear map, on the rank that has the layer."""
        taps, sums, samples, multiplier = Taps(), _Sums(), student.samples, self.dims.residual_multiplier
        block, module = student.module(layer), None
        if block is not None:
            attention, mlp = block.self_attention, block.mlp
            module = {
                "qkv": attention.linear_qkv, "proj": attention.linear_proj,
                "fc1": getattr(mlp, "linear_fc1", None), "fc2": getattr(mlp, "linear_fc2", None),
            }[part]  # fmt: skip
            taps.input(module, "x")
            taps.input(block.input_layernorm if part in ("qkv", "proj") else block.pre_mlp_layernorm, "stream")

        def visit(batch: int) -> None:
            if module is None:
                return
            counted = samples.num_local(batch)
            x_NE = self._tokens(taps.seen["x"], counted, is_sharded=part in ("proj", "fc2"))
            tokens_BS = samples.batches[batch][:counted]
            counts_N1 = context_share(counts_of(tokens_BS), self.mesh).T.flatten()[:, None].double()
            target_NH = targets[part, batch].to(x_NE.device).float()
            if part in ("proj", "fc2"):
                stream_NK = self._tokens(taps.seen["stream"], counted, is_sharded=False)
                if module.bias is not None:
                    stream_NK = stream_NK + multiplier * module.bias.double()
                target_NK = to_student(target_NH).double()
                sums.add(
                    x_NE,
                    (target_NK - stream_NK) / multiplier,
                    counts_N1 / target_NK.square().mean(dim=-1, keepdim=True),
                )
            else:
                sums.add(x_NE, target_NH.double(), counts_N1)

        student.run(layer, visit)
        taps.remove()
        if module is not None:
            self._write(part, layer, module, *sums.reduced(self.mesh))

    def _tokens(self, x_SBE: Tensor, counted: int, *, is_sharded: bool) -> Tensor:
        """Flatten the samples that count, `[N, E]` float64 of whole sequences (of a context-parallel rank)."""
        return whole_over_tp(x_SBE, self.mesh, is_sharded=is_sharded)[:, :counted].flatten(0, 1).double()

    def _write(self, part: str, layer: int, module: Any, gram_EE: Tensor, target_EO: Tensor) -> None:
        """Solve for the whole weight, on every tensor-parallel rank alike, and keep this rank's share."""
        block = "self_attention" if part in ("qkv", "proj") else "mlp"
        name = f"decoder.layers.{layer}.{block}.linear_{part}.weight"
        is_reader = part in ("qkv", "fc1")
        weight_OE = self._whole(module.weight, part)
        if is_reader:
            target_EO = target_EO @ self.wide_source(name).double().to(gram_EE.device).T
        inner_EE = damped(gram_EE, self.ridge)
        change_EO = torch.linalg.solve(inner_EE, target_EO - gram_EE @ weight_OE.T)
        mesh = self.mesh
        share = tp_share(
            name,
            weight_OE + change_EO.T,
            rank=mesh.tp_rank,
            size=mesh.tp_size,
            gated=self.dims.gated_mlp,
            padded_vocab=0,
        )
        module.weight.copy_(share)

    def _whole(self, weight: Tensor, part: str) -> Tensor:
        """Gather the whole weight, float64, from the shares of the tensor-parallel ranks."""
        if self.mesh.tp_size == 1:
            return weight.double()
        if part in ("proj", "fc2"):
            return all_gather(weight, self.mesh.tp_group, dim=1).double()
        if part == "fc1" and self.dims.gated_mlp:  # each rank has its part of the gate above its part of the other half
            halves = [all_gather(half, self.mesh.tp_group, dim=0) for half in weight.chunk(2, 0)]
            return torch.cat(halves).double()
        return all_gather(weight, self.mesh.tp_group, dim=0).double()

    def _teacher_targets(self, teacher: LayerWalk, first: int, start: int, end: int, *, keep: bool) -> Targets:
        """Walk the teacher from layer `first` to before `end`; return the targets of the student's layer `start`.

        A rank that does not `keep` them takes part and gets none.
        """
        dtype, width = self.teacher[0].config.params_dtype, self.teacher_dims.hidden_size
        samples = teacher.samples
        targets: Targets = {}
        for layer in range(first, end):
            taps, parts = self._tapped(teacher, layer, start, end)

            def visit(batch: int, taps: Taps = taps, parts: list[str] = parts) -> None:
                for part in parts:
                    tokens_BS = samples.batches[batch]
                    value_SBH = on_every_stage(taps.pop(part), self.mesh, tokens_BS=tokens_BS, width=width)
                    if keep:
                        value_NH = value_SBH[:, : samples.num_local(batch)].flatten(0, 1)
                        targets[part, batch] = value_NH.to(dtype).cpu()

            teacher.step(layer, visit)
            taps.remove()
        return targets

    def _tapped(self, teacher: LayerWalk, layer: int, start: int, end: int) -> tuple[Taps, list[str]]:
        """Tap a layer of the teacher where this rank has the layer; return the taps and the maps it has targets of."""
        taps, block, parts = Taps(), teacher.module(layer), []
        if layer == start:
            parts += [part for part in self._parts() if part != "fc2"]
        if layer == end - 1 and "fc2" in self._parts():
            parts.append("fc2")
        for part in parts if block is not None else []:
            if part == "proj":
                taps.input(block.pre_mlp_layernorm, part)
            else:
                norms = {"qkv": block.input_layernorm, "fc1": block.pre_mlp_layernorm}
                taps.output(norms.get(part, block), part)
        return taps, parts


@dataclass
class _Sums:
    """The sums ``sum weight x x^T`` and ``sum weight x t^T``, float64."""

    gram_EE: Tensor | None = None
    target_EO: Tensor | None = None

    def add(self, x_NE: Tensor, target_NO: Tensor, weight_N1: Tensor) -> None:
        weighted_EN = (x_NE * weight_N1).T
        gram, target = weighted_EN @ x_NE, weighted_EN @ target_NO
        self.gram_EE = gram if self.gram_EE is None else self.gram_EE + gram
        self.target_EO = target if self.target_EO is None else self.target_EO + target

    def reduced(self, mesh: Mesh) -> tuple[Tensor, Tensor]:
        """Add up the sums of all data- and context-parallel ranks."""
        assert self.gram_EE is not None and self.target_EO is not None
        return all_reduce_sum(self.gram_EE, mesh.dp_cp_group), all_reduce_sum(self.target_EO, mesh.dp_cp_group)
