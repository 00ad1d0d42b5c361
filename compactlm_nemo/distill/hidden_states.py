"""Losses between hidden states of teacher and student at mapped places, on any pipeline stage.

    L = L_logits + alpha L_is,      L_is = sum over pairs of mean over tokens whose prediction counts of d(t, P s),

with t and s the states of a pair of places, P a learned map from the student's width to the teacher's, and d the mean
over channels of the squared difference, or 1 - the cosine. alpha is constant, or the ratio L_logits / L_is of the step
before (the first step measures the ratio on its own batch): alpha is then known before backward starts, equal on every
rank and in every layout, and no device is waited for.

Hooks compare the states on the stage where the student has them and put the gradient in there, so Megatron's schedule
stays as it is. A state that the teacher has on another stage is sent there between the passes of teacher and student.

Shape suffixes: S sequence (this rank's part of it), B batch, H student width, G teacher width.
Source: Muralidharan et al. 2024, arXiv:2407.14679, section 3.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.config.loss import HiddenConfig, StateLoss
from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.distill.layer_pairs import LayerPair, StatePlace
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import context_share, sequence_share
from compactlm_nemo.models.layout import split_layers
from compactlm_nemo.parallel.collectives import move, world_sum
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.callbacks import Callback, Metrics, ModelPass, Step
from compactlm_nemo.training.tracker import LOSS

ALPHA = "train/hidden_alpha"


def state_modules(chunks: ModelChunks) -> dict[StatePlace, Any]:
    """Return the modules of this rank whose outputs are states, `[S, B, H]`."""
    modules: dict[StatePlace, Any] = {}
    for chunk in chunks:
        if chunk.pre_process:
            modules[StatePlace("embedding", 0)] = chunk.embedding
        for layer in chunk.decoder.layers:
            layer_idx = layer.layer_number - 1
            modules[StatePlace("attention", layer_idx)] = layer.self_attention
            modules[StatePlace("mlp_input", layer_idx)] = layer.pre_mlp_layernorm
            if layer_idx:
                modules[StatePlace("layers", layer_idx - 1)] = layer.input_layernorm
        if chunk.post_process:
            modules[StatePlace("layers", chunk.config.num_layers - 1)] = chunk.decoder.final_layernorm
    return modules


def _stage_of(place: StatePlace, num_layers: int, mesh: Mesh) -> int:
    """Return the pipeline stage whose rank has a state: that of the module of `state_modules`."""
    if place.kind == "embedding":
        return 0
    layer = place.layer + (place.kind == "layers")
    chunk_of = [chunk for chunk, count in enumerate(split_layers(num_layers, mesh.layout)) for _ in range(count)]
    return mesh.pp_size - 1 if layer == num_layers else chunk_of[layer] % mesh.pp_size


def state_of(output: Any) -> Tensor:
    """Return the state in a module's output; attention's is the sum with the bias that Megatron hands on separately."""
    if not isinstance(output, tuple):
        return output
    state_SBH, bias_H = output
    return state_SBH if bias_H is None else state_SBH + bias_H


def distance(teacher_SBG: Tensor, student_SBG: Tensor, loss: StateLoss, mask_SB: Tensor) -> Tensor:
    """Sum over tokens the mean squared difference or 1 - the cosine, each times its mask; a float32 scalar."""
    teacher_SBG, student_SBG = teacher_SBG.float(), student_SBG.float()
    if loss is StateLoss.mse:
        return ((teacher_SBG - student_SBG).square().mean(dim=-1) * mask_SB).sum()
    return ((1 - F.cosine_similarity(teacher_SBG, student_SBG, dim=-1)) * mask_SB).sum()


class _Attached(torch.autograd.Function):
    """Passes a state on unchanged; its backward pass also goes through `loss`, times `scale`."""

    @staticmethod
    def forward(ctx: Any, state_SBH: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return state_SBH.view_as(state_SBH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_SBH,) = gradients
        return gradient_SBH, torch.full((), ctx.scale, device=gradient_SBH.device), None


class HiddenStateLoss(Callback):
    """The hidden-state losses of one training.

    Args:
        cfg: Kind of loss, and alpha.
        pairs: The places that are compared.
        teacher: Chunks of the teacher on the student's mesh; its passes must report to `before_teacher_micro_batch`.
        student: Chunks of the student; `forward_each` over them outside of a step is not affected.
        projections: P of each pair; None compares the states as they are.
    """

    def __init__(
        self,
        cfg: HiddenConfig,
        pairs: list[LayerPair],
        teacher: ModelChunks,
        student: ModelChunks,
        projections: Projections | None,
    ) -> None:
        self.cfg, self.pairs, self.mesh, self.projections = cfg, pairs, student.mesh, projections
        self.alpha = cfg.weight
        """Alpha of the next step; None until the first step has measured it."""
        self.width, self.dtype = teacher[0].config.hidden_size, teacher[0].config.params_dtype
        self.teacher_states: dict[tuple[int, int], Tensor] = {}
        """(pair, micro-batch) -> the teacher's state ``[S, B, G]``."""
        self.recomputed: list[deque[int]] = [deque() for _ in pairs]
        """Micro-batches of each pair whose forward pass will be run again for backward, in order."""
        self.teacher_batch: int | None = None
        self.student_batch: int | None = None
        self.masks: list[Tensor] = []
        """Of each micro-batch, ``[S, B]``: which predictions count; states are compared at their places."""
        self.is_listening = self.is_measuring = False
        self.sums = torch.zeros(len(pairs), dtype=torch.float64, device=device())
        layers = [chunks.dims.num_layers for chunks in (teacher, student)]
        self.routes = [
            (_stage_of(pair.teacher, layers[0], self.mesh), _stage_of(pair.student, layers[1], self.mesh))
            for pair in pairs
        ]
        """Pipeline stages of the teacher's and the student's state of each pair."""
        self._register_hooks(state_modules(teacher), state_modules(student))

    def _register_hooks(self, teacher: dict[StatePlace, Any], student: dict[StatePlace, Any]) -> None:
        for pair_idx, pair in enumerate(self.pairs):
            if pair.teacher in teacher:
                teacher[pair.teacher].register_forward_hook(partial(self._keep, pair_idx))
            if pair.student in student:
                student[pair.student].register_forward_hook(partial(self._compare, pair_idx))

    def before_teacher(self) -> None:
        self.is_listening = True

    def before_teacher_micro_batch(self, idx: int | None) -> None:
        """Note that the teacher is about to run micro-batch `idx`; None for one whose states are not wanted."""
        self.teacher_batch = idx if self.is_listening else None

    def before_student(self, student: ModelPass) -> None:
        self._deliver([batch.tokens_BT for batch in student.batches])
        self.masks = [self._mask(batch.tokens_BT) for batch in student.batches]
        if self.alpha is None:
            self._begin(is_measuring=True)
            terms = student.run(forward_only=True)
            self._balance(student.logit_loss(terms), self._finish(terms["train/tokens"]))
        self._begin(is_measuring=False)

    def before_micro_batch(self, idx: int) -> None:
        self.student_batch = idx

    def after_student(self, student: ModelPass, terms: Metrics) -> None:
        alpha, losses = self.alpha, self._finish(terms["train/tokens"])
        assert alpha is not None
        self._balance(student.logit_loss(terms), losses)
        terms |= {LOSS: terms[LOSS] + alpha * sum(losses.values()), ALPHA: alpha} | losses

    def after_update(self, step: Step) -> None:
        if self.projections is not None:
            self.projections.step(step.model.lr)

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha} | ({} if self.projections is None else self.projections.state())

    def load_state(self, state: dict[str, Any]) -> None:
        self.alpha = state["alpha"]
        if self.projections is not None:
            self.projections.load_state(state)

    def _deliver(self, tokens: list[Tensor]) -> None:
        """Send every state to the stage that compares it, after the teacher's pass over micro-batches `[B, S + 1]`."""
        self.is_listening, self.teacher_batch = False, None
        parts = self.mesh.cp_size * (self.mesh.tp_size if self.mesh.is_sequence_parallel else 1)
        for batch_idx, tokens_BT in enumerate(tokens):
            size, length = tokens_BT.shape
            blank_SBG = tokens_BT.new_empty(((length - 1) // parts, size, self.width), dtype=self.dtype)
            for pair_idx, (source, target) in enumerate(self.routes):  # in one order on all ranks
                stage = self.mesh.pp_rank
                if source == target or stage not in (source, target):
                    continue
                state_SBG = self.teacher_states.pop((pair_idx, batch_idx)) if stage == source else blank_SBG
                state_SBG = move(state_SBG, source, target, self.mesh.pp_group)
                if stage == target:
                    self.teacher_states[pair_idx, batch_idx] = state_SBG

    def _begin(self, *, is_measuring: bool) -> None:
        """Start a pass of the student; one that measures has no backward and is followed by another."""
        self.is_measuring = is_measuring
        if self.projections is not None:
            self.projections.zero_grad()
        self.sums = torch.zeros_like(self.sums)

    def _finish(self, num_tokens: float) -> Metrics:
        """End a pass of the student and return the mean of each pair's loss over the global batch, equal on every rank.

        Gradients of the projections become those of alpha times the sum of these losses.
        """
        self.student_batch = None
        # Without sequence parallelism tensor-parallel ranks have equal states.
        counts = self.mesh.is_sequence_parallel or self.mesh.tp_rank == 0
        if self.projections is not None and not self.is_measuring:
            self.projections.reduce(num_tokens, counts)
        means = world_sum(self.sums if counts else torch.zeros_like(self.sums)).cpu() / num_tokens
        return {pair.name: float(mean) for pair, mean in zip(self.pairs, means, strict=True)}

    def _balance(self, logit_loss: float, losses: Metrics) -> None:
        """Take alpha of the next step from the losses of this one, unless the ratio is not finite or alpha constant."""
        if self.cfg.weight is None:
            hidden_loss = sum(losses.values())
            ratio = logit_loss / hidden_loss if hidden_loss else 0.0
            self.alpha = ratio if math.isfinite(ratio) else self.alpha or 0.0

    def _keep(self, pair_idx: int, _: Any, args: Any, output: Any) -> None:
        """Keep the state of the micro-batch: a forward hook of the teacher."""
        if self.teacher_batch is not None:
            # A copy: without gradients Megatron adds the residual to attention's output in place.
            self.teacher_states[pair_idx, self.teacher_batch] = state_of(output).detach().clone()

    def _compare(self, pair_idx: int, _: Any, args: Any, output: Any) -> Any:
        """Add the loss to the sums, and its gradient to the output's: a forward hook of the student."""
        if self.student_batch is None:
            return output
        batch_idx = self.student_batch
        if self.is_measuring:
            self.sums[pair_idx] += self._loss(pair_idx, batch_idx, self.teacher_states[pair_idx, batch_idx], output)
            return output
        if not torch.is_grad_enabled():
            self.recomputed[pair_idx].append(batch_idx)
            return output
        if self.recomputed[pair_idx]:
            batch_idx = self.recomputed[pair_idx].popleft()
        loss = self._loss(pair_idx, batch_idx, self.teacher_states.pop((pair_idx, batch_idx)), output)
        self.sums[pair_idx] += loss.detach()
        assert self.alpha is not None
        if isinstance(output, tuple):
            return (_Attached.apply(output[0], loss, self.alpha), *output[1:])
        return _Attached.apply(output, loss, self.alpha)

    def _mask(self, tokens_BT: Tensor) -> Tensor:
        """Return ``[S, B]`` float32 of this rank's part of the sequence: 1 where a prediction counts, else 0."""
        return sequence_share(context_share(counts_of(tokens_BT[:, :-1]), self.mesh).T.float(), self.mesh)

    def _loss(self, pair_idx: int, batch_idx: int, teacher_SBG: Tensor, output: Any) -> Tensor:
        student_SBH = state_of(output)
        if self.projections is not None:
            student_SBH = self.projections(pair_idx, student_SBH)
        return distance(teacher_SBG, student_SBH, self.cfg.loss, self.masks[batch_idx])
