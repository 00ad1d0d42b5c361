"""Block-local distillation trains each layer of a cut student by itself, to give the teacher's stream behind it.

Layer j of the student stands for the layers [i, n) of the teacher: i is the kept one, n the next that stays. With h_i
the teacher's stream before its layer i and T the map of the stream to the student's (`HiddenCut.stream_map`), y_j the
output of layer j on its input, and the tokens that count (`data.marks`) of one step,

    L_j = 1 / tokens * sum over tokens of mean((y_j - T(h_n))^2) / mean(T(h_n)^2)        means over channels

is brought down over all parameters of the layer. So a layer whose followers are removed learns their work too. Its
input is the student's stream, which has the errors of all layers before, one layer after another
(`from_teacher=False`), or T(h_i), each layer for itself, where pipeline stages train theirs at once. The first layer
sees the embedding either way.

Adam (no decay; beta 0.9 and 0.95) moves float32 weights. The learning rate of a weight W is a share of its size, as a
turned stream makes some weights ten times smaller than others: at step s of n

    lr * rms(W) * min(1, (s + 1) / w) * (1 + cos(pi s / n)) / 2        w = max(1, n / 20), rms(W) before training

A step is over `batch` windows; which windows make a step is fixed, the order of the
steps changes from pass to pass. A layer whose loss over all windows is not lower in the end keeps the weights it had.

A rank holds on its device the states of its tokens before and after one layer and the optimizer of that layer; of the
teacher's stream, on the host, what the layer needs. With T(h_i) as inputs and a pipeline the latter is for all layers
of the rank.

Shape suffixes: S sequence (of this rank), B batch, K hidden size of the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from compactlm_nemo.data.marks import counts_of
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import DataParallelSamples, context_share, sequence_share
from compactlm_nemo.parallel.collectives import all_gather_objects, all_reduce_sum, barrier
from compactlm_nemo.parallel.hang import beat
from compactlm_nemo.parallel.interruption import stop_if_asked
from compactlm_nemo.pruning.layer_gradients import LayerWeights
from compactlm_nemo.pruning.layer_walk import LayerWalk, spans
from compactlm_nemo.pruning.plan import Plan
from compactlm_nemo.pruning.residual_stream import HiddenCut

Stream = dict[int, Tensor]
"""Micro-batch -> ``T(h)``, `[S, B, K]` in the model's dtype on the host, as the output of a layer lies on this rank."""


@dataclass(frozen=True, kw_only=True)
class BlockTraining:
    """How each layer is trained."""

    lr: float
    """Largest learning rate, as a share of the root mean square of each weight."""
    passes: int
    """Over all windows."""
    batch: int
    """Windows of a step, over all data-parallel ranks, whose number divides it."""
    micro_batch: int
    """Most windows of a rank that run at once."""
    seed: int
    from_teacher: bool
    """Whether the input of a layer is the teacher's stream and not the student's."""


class LayerStore(Protocol):
    """Keeps finished layers, so that a killed run goes on."""

    def load(self, layer: int) -> dict[str, Tensor] | None:
        """Return this rank's weights of a layer, by name, that `save` was given; None without such."""

    def save(self, layer: int, weights: dict[str, Tensor]) -> None:
        """Keep this rank's weights of a layer."""


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of a number that is not above a limit."""
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)


@dataclass(frozen=True, kw_only=True)
class BlockDistillation:
    """A walk over the student's layers, which `run` trains."""

    student: ModelChunks
    teacher: ModelChunks
    plan: Plan
    hidden: HiddenCut
    windows_NS: Tensor
    """Equal on every rank."""
    training: BlockTraining
    store: LayerStore | None = None
    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Layer -> its loss before and after training; equal on every rank once `run` is done."""

    @cached_property
    def samples(self) -> DataParallelSamples:
        of_rank = self.training.batch // self.student.mesh.dp_size
        micro_batch = largest_divisor(of_rank, self.training.micro_batch)
        return DataParallelSamples(self.windows_NS, self.student.mesh, micro_batch)

    @cached_property
    def walk(self) -> LayerWalk:
        return LayerWalk(self.student.eval(), self.samples)

    def run(self, progress: Callable[[int], None]) -> None:
        """Train the student in place; `progress` is called with 1 for each finished layer. Collective.

        Raises:
            NumericsError: the loss of a layer is NaN or infinite.
        """
        with torch.no_grad(), _frozen(self.student):
            if self.training.from_teacher:
                self._train_on_teacher(progress)
            else:
                self._train_in_order(progress)

    def _train_in_order(self, progress: Callable[[int], None]) -> None:
        """Train one layer after another on the student's stream."""
        walk, teacher, first = self.walk, LayerWalk(self.teacher.eval(), self.samples), 0
        for layer, (_, end) in enumerate(spans(self.plan.layers, self.teacher.dims)):
            is_here = walk.module(layer) is not None
            is_done = is_here and self._load(layer)
            target = self._stream_before(teacher, first, end, keep=is_here and not is_done)
            if is_here and not is_done:
                self._train(layer, target)
            self._meet(f"layer {layer} is trained")
            if is_done or self.student.mesh.pp_size > 1:
                walk.run(layer)
            walk.advance(layer)
            first = end
            progress(1)

    def _train_on_teacher(self, progress: Callable[[int], None]) -> None:
        """Train all layers on the teacher's stream; those of different pipeline stages at once."""
        walk, teacher, first = self.walk, LayerWalk(self.teacher.eval(), self.samples), 0
        here = [layer for layer in range(self.student.dims.num_layers) if walk.module(layer) is not None]
        missing = [layer for layer in here if not self._load(layer)]
        streams: dict[int, Stream] = {0: {}}
        at_once = self.student.mesh.pp_size == 1
        for layer, (_, end) in enumerate(spans(self.plan.layers, self.teacher.dims)):
            keep = layer in missing or layer + 1 in missing
            streams[layer + 1] = self._stream_before(teacher, first, end, keep=keep)
            first = end
            if at_once:
                self._train_between(layer, missing, streams)
                self._meet(f"layer {layer} is trained")
                progress(1)
        if not at_once:
            for number in range(max(all_gather_objects(len(here)))):
                if number < len(here):
                    self._train_between(here[number], missing, streams)
                self._meet(f"{number + 1} layers of each pipeline stage are trained")
                progress(self.student.mesh.pp_size)

    def _train_between(self, layer: int, missing: list[int], streams: dict[int, Stream]) -> None:
        """Train a layer that is missing on the stream before it, and forget that stream."""
        inputs = streams.pop(layer)
        if layer in missing:
            chunk, device = self.walk.chunk(layer), self.windows_NS.device
            assert chunk is not None
            chunk.inputs = {batch: x_SBK.to(device) for batch, x_SBK in inputs.items()}
            self._train(layer, streams[layer + 1])
            chunk.inputs, chunk.outputs = {}, {}

    def _stream_before(self, teacher: LayerWalk, first: int, end: int, *, keep: bool) -> Stream:
        """Walk the teacher from layer `first` to before `end`; return its stream there where it is to `keep`."""
        for layer in range(first, end - 1):
            teacher.step(layer)
        stream: Stream = {}
        dtype, mesh = self.student[0].config.params_dtype, self.student.mesh
        to_student = self.hidden.stream_map(self.windows_NS.device)

        def keep_share(batch: int, whole_SBH: Tensor) -> None:
            share_SBH = sequence_share(whole_SBH, mesh)
            mapped_NK = to_student(share_SBH.flatten(0, 1))
            mapped_SBK = mapped_NK.view(*share_SBH.shape[:2], -1).to(dtype).contiguous()
            stream[batch] = mapped_SBK.cpu().pin_memory() if mapped_SBK.is_cuda else mapped_SBK

        teacher.stream_after(end - 1, keep_share if keep else None)
        return stream

    def _load(self, layer: int) -> bool:
        """Give a layer the weights it was trained to before a restart; return whether there are such."""
        kept = self.store.load(layer) if self.store is not None else None
        if kept is None:
            return False
        for name, parameter in self.walk.module(layer).named_parameters():
            parameter.copy_(kept[name])
        before, after = kept["losses"].tolist()
        self.losses[layer] = before, after
        return True

    def _train(self, layer: int, target: Stream) -> None:
        """Train a layer of this rank, and keep it where it became better. Collective over its data-parallel ranks."""
        module, training, num_steps = self.walk.module(layer), self.training, len(self._steps)
        before = self._loss(layer, target)
        initial = [parameter.clone() for parameter in module.parameters()]
        weights, total = LayerWeights(module, self.student.mesh, lr=training.lr), training.passes * num_steps
        generator = torch.Generator().manual_seed(training.seed)
        for number in range(training.passes):
            for place, step in enumerate(torch.randperm(num_steps, generator=generator).tolist()):
                self._step(layer, step, target, weights)
                weights.update(_share_of_lr(number * num_steps + place, total))
                beat()
        weights.finish()
        after = self._loss(layer, target)
        if math.isfinite(after) and not after < before:
            for parameter, value in zip(module.parameters(), initial, strict=True):
                parameter.copy_(value)
            after = self._loss(layer, target)
        self.losses[layer] = before, after
        if self.store is not None and math.isfinite(after):
            state = {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}
            self.store.save(layer, state | {"losses": torch.tensor([before, after], dtype=torch.float64)})

    def _step(self, layer: int, step: int, target: Stream, weights: LayerWeights) -> None:
        for batch in self._steps[step]:
            with torch.enable_grad():
                loss = self._loss_sum(layer, batch, target) / self._tokens[step]
                loss.backward()
            weights.take_gradients()

    @cached_property
    def _steps(self) -> list[list[int]]:
        """The micro-batches of each step."""
        size = self.training.batch // (self.student.mesh.dp_size * self.samples.micro_batch)
        numbers = list(range(len(self.samples.batches)))
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    @cached_property
    def _counts(self) -> list[Tensor]:
        """`[S, B]` of each micro-batch, float32: 1 for the tokens of this rank that count, 0 for others."""
        counts = []
        for batch, tokens_BS in enumerate(self.samples.batches):
            is_sample_B = torch.arange(len(tokens_BS), device=tokens_BS.device) < self.samples.num_local(batch)
            counts_BS = counts_of(tokens_BS) & is_sample_B[:, None]
            counts.append(context_share(counts_BS, self.student.mesh).T.float())
        return counts

    @cached_property
    def _tokens(self) -> Tensor:
        """Tokens of each step that count, over all ranks, float64."""
        sums = [torch.stack([self._counts[batch].double().sum() for batch in step]).sum() for step in self._steps]
        return all_reduce_sum(torch.stack(sums), self.student.mesh.dp_cp_group)

    def _loss_sum(self, layer: int, batch: int, target: Stream) -> Tensor:
        """Sum the losses of this rank's tokens of a micro-batch, float32."""
        output_SBK = self.walk.output(layer, batch).float()
        target_SBK = target[batch].to(output_SBK.device, non_blocking=True).float()
        weight_SB = sequence_share(self._counts[batch], self.student.mesh) / target_SBK.square().mean(dim=-1)
        return ((output_SBK - target_SBK).square().mean(dim=-1) * weight_SB).sum()

    def _loss(self, layer: int, target: Stream) -> float:
        """Return the loss of a layer over all windows, and leave the layer's outputs for `LayerWalk.advance`."""
        mesh = self.student.mesh
        sums = [self._loss_sum(layer, batch, target).double() for batch in range(len(self.samples.batches))]
        total = all_reduce_sum(torch.stack(sums).sum(), mesh.dp_cp_group)
        if mesh.is_sequence_parallel:
            total = all_reduce_sum(total, mesh.tp_group)
        return float(total.item() / self._tokens.sum().item())

    def _meet(self, state: str) -> None:
        """Wait for all ranks, refuse a loss that is not finite, and stop where one was asked to. Collective."""
        barrier()  # of the group with the long timeout: ranks without the layer have waited while others trained it
        for losses in all_gather_objects(self.losses):
            self.losses.update(losses)
        for layer, (before, after) in sorted(self.losses.items()):
            if not math.isfinite(before):
                raise NumericsError(
                    f"prune.blocks=distill: the loss of layer {layer} is {before} before training; look at the cut's "
                    "weights, or set model.precision=fp32."
                )
            if not math.isfinite(after):
                raise NumericsError(
                    f"prune.blocks=distill: the loss of layer {layer} is {after} after training; lower "
                    f"prune.block_lr={self.training.lr:g}."
                )
        stop_if_asked(state)


def _share_of_lr(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the largest one: linear warm-up, cosine to 0."""
    return min(1.0, (step + 1) / max(1.0, steps / 20)) * (1 + math.cos(math.pi * step / steps)) / 2


@contextmanager
def _frozen(model: ModelChunks) -> Iterator[None]:
    """Let no parameter of the model ask for a gradient in the body."""
    were = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in were:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, was in were:
            parameter.requires_grad_(was)
