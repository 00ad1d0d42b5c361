"""Sources of a step's targets: a teacher that runs beside the student, stored targets on disk, or the labels alone.

Shape suffixes: B samples, S tokens, T a sample's tokens on this rank, K stored entries, G teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from compactlm_nemo.distill.stored_targets import StoredTargets, decode_hidden, decode_top_k
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import context_share, forward_each
from compactlm_nemo.parallel.collectives import all_gather, all_gather_objects, broadcast
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.batches import Batch


class Teacher(Protocol):
    """A source of targets; collective."""

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return micro-batches' targets, tokens in order ``[S / cp, B]``; empty before the last stage. Collective."""


class LiveTeacher:
    """A model on the student's mesh, which runs forward over the micro-batches of a step.

    Args:
        chunks: This rank's part of the teacher.
        on_input: Called with the number of the micro-batch that a chunk starts, None for one that only fills the
            schedule.
    """

    def __init__(self, chunks: ModelChunks, on_input: Callable[[int | None], None] | None = None) -> None:
        self.chunks, self.on_input = chunks.eval(), on_input

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return the teacher's final normed hidden states with its output weights."""
        inputs = [batch.tokens_BT[:, :-1] for batch in batches]
        hidden = forward_each(self.chunks, inputs, lambda idx, hidden_SBG: hidden_SBG, self.on_input)
        return [TeacherHead(hidden_SBG.flatten(0, 1), self.chunks.head_weight) for hidden_SBG in hidden]


class OwnMeshTeacher:
    """A model on a mesh of its own over the student's processes, with its own tensor- and pipeline-parallel sizes.

    The micro-batches of all the student's data-parallel ranks are dealt out to the teacher's, and every hidden state
    goes to the ranks that train on its samples. Neither mesh may be context parallel.

    Args:
        chunks: This rank's part of the teacher on its mesh.
        mesh: The student's mesh.
        head_weight: ``[V, G]``, the teacher's output weights as the student's mesh shards them; None before the
            student's last stage.
    """

    def __init__(self, chunks: ModelChunks, mesh: Mesh, head_weight: Tensor | None) -> None:
        self.chunks, self.mesh, self.head_weight = chunks.eval(), mesh, head_weight
        self.teacher_mesh = teacher_mesh = chunks.mesh
        ranks = all_gather_objects((teacher_mesh.is_last_stage and teacher_mesh.tp_rank == 0, teacher_mesh.dp_rank))
        self.source_rank = {dp_rank: rank for rank, (is_source, dp_rank) in enumerate(ranks) if is_source}
        """The teacher's data-parallel rank -> the global rank that sends its hidden states."""

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return the teacher's final normed hidden states with its output weights."""
        hidden: list[Tensor] = []
        for _, group in groupby(batches, key=lambda batch: batch.tokens_BT.shape):
            hidden += self._of_one_shape(torch.stack([batch.tokens_BT for batch in group]))
        if self.head_weight is None:
            return []
        return [TeacherHead(hidden_SBG.flatten(0, 1), self.head_weight) for hidden_SBG in hidden]

    def _of_one_shape(self, tokens_MBT: Tensor) -> list[Tensor]:
        """Return hidden states ``[S, B, G]`` of each of this rank's M micro-batches, which have one shape."""
        batches = all_gather(tokens_MBT, self.mesh.dp_group, dim=0).unbind()
        teacher_mesh = self.teacher_mesh
        missing = -len(batches) % teacher_mesh.dp_size  # all of the teacher's ranks run equally many
        dealt = [*batches, *batches[-1:] * missing][teacher_mesh.dp_rank :: teacher_mesh.dp_size]
        inputs = [batch_BT[:, :-1] for batch_BT in dealt]
        with teacher_mesh.active():
            computed = forward_each(self.chunks, inputs, lambda idx, hidden_SBG: hidden_SBG)
        config, (_, size, length) = self.chunks[0].config, tokens_MBT.shape
        blank_SBG = tokens_MBT.new_empty((length - 1, size, config.hidden_size), dtype=config.params_dtype)
        first = self.mesh.dp_rank * len(tokens_MBT)
        local_states = []
        for batch_idx in range(len(batches)):
            turn, dp_rank = divmod(batch_idx, teacher_mesh.dp_size)
            is_computed_here = bool(computed) and dp_rank == teacher_mesh.dp_rank
            hidden_SBG = broadcast(computed[turn] if is_computed_here else blank_SBG, self.source_rank[dp_rank])
            if first <= batch_idx < first + len(tokens_MBT) and self.head_weight is not None:
                local_states.append(hidden_SBG)
        return local_states


class NoTeacher:
    """The source for a training on the labels alone."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return targets that hold nothing but the number of tokens."""
        counts = [context_share(batch.tokens_BT[:, 1:], self.mesh).numel() for batch in batches]
        return [NoTargets(count) for count in counts] if self.mesh.is_last_stage else []


class StoredTopK:
    """A source that reads the teacher's likeliest tokens from disk, without a teacher in memory."""

    def __init__(self, store: StoredTargets, mesh: Mesh) -> None:
        self.store, self.mesh, self.k = store, mesh, int(store.metadata["k"])

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return the stored targets, read on the last stage."""
        return [self._of(batch) for batch in batches] if self.mesh.is_last_stage else []

    def _of(self, batch: Batch) -> TopK:
        length, device = batch.tokens_BT.shape[1] - 1, batch.tokens_BT.device
        records = [decode_top_k(self.store.record(sample), length, self.k) for sample in batch.samples]
        fields = [torch.stack(field) for field in zip(*records, strict=True)]
        shares = [context_share(field, self.mesh).transpose(0, 1).flatten(0, 1) for field in fields]
        return TopK(*(share.contiguous().to(device, non_blocking=True) for share in shares))


class StoredHidden:
    """A source that reads final hidden states from disk; only the teacher's output weights are in memory.

    Args:
        head_weight: ``[V, G]``, this rank's rows, in the dtype of the stored states; None before the last stage.
    """

    def __init__(self, store: StoredTargets, mesh: Mesh, head_weight: Tensor | None) -> None:
        self.store, self.mesh, self.head_weight = store, mesh, head_weight

    def targets(self, batches: list[Batch]) -> list[Targets]:
        """Return the stored targets, read on the last stage."""
        return [self._of(batch) for batch in batches] if self.mesh.is_last_stage else []

    def _of(self, batch: Batch) -> TeacherHead:
        assert self.head_weight is not None
        length, width = batch.tokens_BT.shape[1] - 1, self.head_weight.shape[1]
        dtype = self.head_weight.dtype
        records = [decode_hidden(self.store.record(sample), length, width, dtype) for sample in batch.samples]
        hidden_BTG = torch.stack(records)
        hidden_SBG = context_share(hidden_BTG, self.mesh).transpose(0, 1).to(self.head_weight, non_blocking=True)
        return TeacherHead(hidden_SBG.flatten(0, 1), self.head_weight)
