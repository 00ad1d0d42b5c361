"""Losses between hidden states of teacher and student at mapped places, on any pipeline stage.

    L = L_logits + alpha L_is,      L_is = sum over pairs of mean over tokens of d(t, P s),

with t and s the states of a pair of places, P a learned map from the student's width to the teacher's, and d the mean
over channels of the squared difference, or 1 - the cosine. alpha is constant, or the ratio L_logits / L_is of the step
before (the first step measures it on its own batch): it is then known before backward starts, equal on every rank and
in every layout, and no device is waited for.

Hooks compare the states where the student has them, and put the gradient in on that stage: the schedule knows nothing
of it. A state that the teacher has on another stage is sent there between the teacher's pass and the student's.

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
from compactlm_nemo.distill.layer_pairs import LayerPair, Place
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.parallel.collectives import all_gather_objects, move, world_sum
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh

ALPHA = "train/hidden_alpha"


def places_of(chunks: ModelChunks) -> dict[Place, Any]:
    """The modules of this rank whose outputs are states, `[S, B, H]`."""
    found: dict[Place, Any] = {}
    for chunk in chunks:
        if chunk.pre_process:
            found[Place("embedding", 0)] = chunk.embedding
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            found[Place("attention", number)] = layer.self_attention
            found[Place("mlp_input", number)] = layer.pre_mlp_layernorm
            if number:
                found[Place("layers", number - 1)] = layer.input_layernorm
        if chunk.post_process:
            found[Place("layers", chunk.config.num_layers - 1)] = chunk.decoder.final_layernorm
    return found


def state_of(output: Any) -> Tensor:
    """What a module gives; of attention with the bias that Megatron hands on beside it."""
    if not isinstance(output, tuple):
        return output
    state_SBH, bias_H = output
    return state_SBH if bias_H is None else state_SBH + bias_H


def distance(teacher_SBG: Tensor, student_SBG: Tensor, loss: StateLoss) -> Tensor:
    """Sum over tokens, a float32 scalar, of the mean squared difference or of 1 - the cosine."""
    teacher_SBG, student_SBG = teacher_SBG.float(), student_SBG.float()
    if loss is StateLoss.mse:
        return (teacher_SBG - student_SBG).square().mean(dim=-1).sum()
    return (1 - F.cosine_similarity(teacher_SBG, student_SBG, dim=-1)).sum()


class _Attached(torch.autograd.Function):
    """A state as it is, whose backward pass also goes through `loss`, times `scale`."""

    @staticmethod
    def forward(ctx: Any, state_SBH: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return state_SBH.view_as(state_SBH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_SBH,) = gradients
        return gradient_SBH, torch.full((), ctx.scale, device=gradient_SBH.device), None


class HiddenStateLoss:
    """The hidden-state losses of one training; collective like the steps that it is part of.

    Args:
        cfg: Kind of loss, and alpha.
        pairs: What is compared.
        teacher: Chunks of the teacher on the student's mesh.
        student: Chunks of the student; `forward_each` over them outside of a step is not affected.
        projections: P of each pair; None compares as they are.
    """

    def __init__(
        self,
        cfg: HiddenConfig,
        pairs: list[LayerPair],
        teacher: ModelChunks,
        student: ModelChunks,
        mesh: Mesh,
        projections: Projections | None,
    ) -> None:
        self.cfg, self.pairs, self.mesh, self.projections = cfg, pairs, mesh, projections
        self.alpha = cfg.weight
        """Of the next step; None until the first has measured it."""
        self.width, self.dtype = teacher[0].config.hidden_size, teacher[0].config.params_dtype
        self.kept: dict[tuple[int, int], Tensor] = {}
        """(pair, micro-batch) -> the teacher's state."""
        self.waiting: list[deque[int]] = [deque() for _ in pairs]
        """Micro-batches of a pair whose forward pass will be run again for backward, in their order."""
        self.teacher_batch: int | None = None
        self.student_batch: int | None = None
        self.is_listening = self.is_measuring = False
        self.sums = torch.zeros(len(pairs), dtype=torch.float64, device=device())
        theirs, ours = places_of(teacher), places_of(student)
        everyone = all_gather_objects((mesh.pp_rank, list(theirs), list(ours)))
        teacher_stage = {place: stage for stage, places, _ in everyone for place in places}
        student_stage = {place: stage for stage, _, places in everyone for place in places}
        self.route = [(teacher_stage[pair.teacher], student_stage[pair.student]) for pair in pairs]
        for number, pair in enumerate(pairs):
            if pair.teacher in theirs:
                theirs[pair.teacher].register_forward_hook(partial(self._keep, number))
            if pair.student in ours:
                ours[pair.student].register_forward_hook(partial(self._compare, number))

    def listen(self) -> None:
        """The teacher's next pass is over the micro-batches of a step."""
        self.is_listening = True

    def on_teacher(self, batch: int | None) -> None:
        """The teacher is about to run this micro-batch; None for one whose states are not wanted."""
        self.teacher_batch = batch if self.is_listening else None

    def on_student(self, batch: int) -> None:
        """The student is about to run this micro-batch."""
        self.student_batch = batch

    def begin(self, *, is_measuring: bool) -> None:
        """A pass of the student starts; one that measures has no backward and is followed by another."""
        self.is_measuring = is_measuring
        if self.projections is not None:
            self.projections.zero_grad()
        self.sums = torch.zeros_like(self.sums)

    def deliver(self, tokens: list[Tensor]) -> None:
        """Send every state to the stage that compares it, after the teacher's pass over micro-batches `[B, S + 1]`."""
        self.is_listening, self.teacher_batch = False, None
        parts = self.mesh.cp_size * (self.mesh.tp_size if self.mesh.is_sequence_parallel else 1)
        for batch, tokens_BT in enumerate(tokens):
            size, length = tokens_BT.shape
            blank = tokens_BT.new_empty(((length - 1) // parts, size, self.width), dtype=self.dtype)
            for number, (source, target) in enumerate(self.route):  # in one order on all ranks
                here = self.mesh.pp_rank
                if source == target or here not in (source, target):
                    continue
                state_SBG = self.kept.pop((number, batch)) if here == source else blank
                state_SBG = move(state_SBG, source, target, self.mesh.pp_group)
                if here == target:
                    self.kept[number, batch] = state_SBG

    def _keep(self, number: int, _: Any, args: Any, output: Any) -> None:
        if self.teacher_batch is not None:
            # A copy: without gradients Megatron adds the residual to attention's output in place.
            self.kept[number, self.teacher_batch] = state_of(output).detach().clone()

    def _compare(self, number: int, _: Any, args: Any, output: Any) -> Any:
        if self.student_batch is None:
            return output
        batch = self.student_batch
        if self.is_measuring:
            self.sums[number] += self._loss(number, self.kept[number, batch], state_of(output))
            return output
        if not torch.is_grad_enabled():
            self.waiting[number].append(batch)
            return output
        if self.waiting[number]:
            batch = self.waiting[number].popleft()
        loss = self._loss(number, self.kept.pop((number, batch)), state_of(output))
        self.sums[number] += loss.detach()
        assert self.alpha is not None
        if isinstance(output, tuple):
            return (_Attached.apply(output[0], loss, self.alpha), *output[1:])
        return _Attached.apply(output, loss, self.alpha)

    def _loss(self, number: int, teacher_SBG: Tensor, student_SBH: Tensor) -> Tensor:
        if self.projections is not None:
            student_SBH = self.projections(number, student_SBH)
        return distance(teacher_SBG, student_SBH, self.cfg.loss)

    def finish(self, num_tokens: float) -> dict[str, float]:
        """After the student's pass: the mean of each pair's loss over the global batch, equal on every rank.

        Gradients of the projections become those of alpha times the sum of these.
        """
        self.student_batch = None
        # Without sequence parallelism tensor-parallel ranks have the same states.
        counts = self.mesh.is_sequence_parallel or self.mesh.tp_rank == 0
        if self.projections is not None and not self.is_measuring:
            self.projections.reduce(num_tokens, counts)
        means = world_sum(self.sums if counts else torch.zeros_like(self.sums)).cpu() / num_tokens
        return {pair.name: float(mean) for pair, mean in zip(self.pairs, means, strict=True)}

    def balance(self, logit_loss: float, hidden_loss: float) -> None:
        """Take alpha of the next step from the losses of this one, unless they are not finite or alpha is constant."""
        if self.cfg.weight is None:
            ratio = logit_loss / hidden_loss if hidden_loss else 0.0
            self.alpha = ratio if math.isfinite(ratio) else self.alpha or 0.0

    def step(self, lr: float) -> None:
        """Move the projections."""
        if self.projections is not None:
            self.projections.step(lr)

    def state(self) -> dict[str, Any]:
        """For a checkpoint of any layout."""
        return {"alpha": self.alpha} | ({} if self.projections is None else self.projections.state())

    def load_state(self, state: dict[str, Any]) -> None:
        self.alpha = state["alpha"]
        if self.projections is not None:
            self.projections.load_state(state)
