"""Where the targets of a step come from: a teacher that runs beside the student, or what one said before, on disk.

Shape suffixes: B samples, S tokens, T a sample's tokens on this rank, K stored entries, G teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compactlm_nemo.distill.stored_targets import StoredTargets, decode_hidden, decode_top_k
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import context_share, forward_each
from compactlm_nemo.parallel.collectives import all_gather, all_gather_objects, broadcast
from compactlm_nemo.parallel.mesh import Mesh


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    tokens_BT: Tensor
    """``[B, S + 1]`` token ids."""
    samples: Sequence[int]
    """Numbers of the B samples in the training order."""


class Teacher(Protocol):
    """A source of targets."""

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """For each micro-batch, of its tokens in the order ``[S / cp, B]``; empty before the last stage. Collective."""


class LiveTeacher:
    """A model on the student's mesh: one forward-only pass of its own over the micro-batches of a step.

    `on_input` is told which micro-batch a chunk starts, None for one that only fills the schedule.
    """

    def __init__(self, chunks: ModelChunks, mesh: Mesh, on_input: Callable[[int | None], None] | None = None) -> None:
        self.chunks, self.mesh, self.on_input = chunks.eval(), mesh, on_input

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Final normed hidden states and the output weights."""
        inputs = [batch.tokens_BT[:, :-1] for batch in batches]
        hidden = forward_each(self.chunks, self.mesh, inputs, lambda idx, hidden_SBG: hidden_SBG, self.on_input)
        return [TeacherHead(hidden_SBG.flatten(0, 1), self.chunks.head_weight) for hidden_SBG in hidden]


class OwnMeshTeacher:
    """A model on a mesh of its own over the same processes: other tensor- and pipeline-parallel sizes than the student.

    The micro-batches of all the student's data-parallel ranks are dealt out to the teacher's, and every hidden state
    goes to the ranks whose samples it is of. Neither mesh may be context parallel.

    Args:
        chunks: This rank's part of the teacher on `own`.
        own: The teacher's mesh.
        mesh: The student's.
        head_weight: ``[V, G]``, the teacher's output weights as the student's mesh shards them; None before its last
            stage.
    """

    def __init__(self, chunks: ModelChunks, own: Mesh, mesh: Mesh, head_weight: Tensor | None) -> None:
        self.chunks, self.own, self.mesh, self.head_weight = chunks.eval(), own, mesh, head_weight
        places = all_gather_objects((own.is_last_stage and own.tp_rank == 0, own.dp_rank))
        self.source = {dp_rank: rank for rank, (gives, dp_rank) in enumerate(places) if gives}

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Final normed hidden states and the output weights."""
        hidden: list[Tensor] = []
        for _, group in groupby(batches, key=lambda batch: batch.tokens_BT.shape):
            hidden += self._of_one_shape(torch.stack([batch.tokens_BT for batch in group]))
        if self.head_weight is None:
            return []
        return [TeacherHead(hidden_SBG.flatten(0, 1), self.head_weight) for hidden_SBG in hidden]

    def _of_one_shape(self, tokens_MBT: Tensor) -> list[Tensor]:
        """``[S, B, G]`` for each of this rank's M micro-batches."""
        every = all_gather(tokens_MBT, self.mesh.dp_group, dim=0).unbind()
        missing = -len(every) % self.own.dp_size  # all of the teacher's ranks run equally many
        dealt = [*every, *every[-1:] * missing][self.own.dp_rank :: self.own.dp_size]
        with self.own.active():
            found = forward_each(self.chunks, self.own, [batch[:, :-1] for batch in dealt], lambda idx, hidden: hidden)
        config, (_, size, length) = self.chunks[0].config, tokens_MBT.shape
        blank = tokens_MBT.new_empty((length - 1, size, config.hidden_size), dtype=config.params_dtype)
        first = self.mesh.dp_rank * len(tokens_MBT)
        mine = []
        for number in range(len(every)):
            turn, dp_rank = divmod(number, self.own.dp_size)
            gives = bool(found) and dp_rank == self.own.dp_rank
            hidden_SBG = broadcast(found[turn] if gives else blank, self.source[dp_rank])
            if first <= number < first + len(tokens_MBT) and self.head_weight is not None:
                mine.append(hidden_SBG)
        return mine


class NoTeacher:
    """Training on the labels alone."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Nothing but the number of tokens."""
        counts = [context_share(batch.tokens_BT[:, 1:], self.mesh).numel() for batch in batches]
        return [NoTargets(count) for count in counts] if self.mesh.is_last_stage else []


class StoredTopK:
    """Likeliest tokens from disk: no teacher in memory."""

    def __init__(self, store: StoredTargets, mesh: Mesh) -> None:
        self.store, self.mesh, self.k = store, mesh, int(store.metadata["k"])

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Of the last stage's tokens."""
        return [self._of(batch) for batch in batches] if self.mesh.is_last_stage else []

    def _of(self, batch: Batch) -> TopK:
        length, device = batch.tokens_BT.shape[1] - 1, batch.tokens_BT.device
        records = [decode_top_k(self.store.record(sample), length, self.k) for sample in batch.samples]
        fields = [torch.stack(field) for field in zip(*records, strict=True)]
        own = [context_share(field, self.mesh).transpose(0, 1).flatten(0, 1) for field in fields]
        return TopK(*(field.contiguous().to(device, non_blocking=True) for field in own))


class StoredHidden:
    """Final hidden states from disk and the teacher's output weights: no teacher's layers in memory.

    Args:
        head_weight: ``[V, G]``, this rank's rows, in the dtype of the stored states; None before the last stage.
    """

    def __init__(self, store: StoredTargets, mesh: Mesh, head_weight: Tensor | None) -> None:
        self.store, self.mesh, self.head_weight = store, mesh, head_weight

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Of the last stage's tokens."""
        return [self._of(batch) for batch in batches] if self.mesh.is_last_stage else []

    def _of(self, batch: Batch) -> TeacherHead:
        assert self.head_weight is not None
        length, width = batch.tokens_BT.shape[1] - 1, self.head_weight.shape[1]
        dtype = self.head_weight.dtype
        records = [decode_hidden(self.store.record(sample), length, width, dtype) for sample in batch.samples]
        hidden_BTG = torch.stack(records)
        own_SBG = context_share(hidden_BTG, self.mesh).transpose(0, 1).to(self.head_weight, non_blocking=True)
        return TeacherHead(own_SBG.flatten(0, 1), self.head_weight)
