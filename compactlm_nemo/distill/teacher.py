"""Sources of a step's targets: a teacher that runs beside the student, stored targets on disk, or the labels alone.

Shape suffixes: B samples, S tokens, T a sample's tokens on this rank, K stored entries, G teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import overload

import torch
from torch import Tensor

from compactlm_nemo.distill.stored_targets import StoredTargets, decode_hidden, decode_top_k, split_record, spread
from compactlm_nemo.errors import DataError
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.forward import context_share, forward_each
from compactlm_nemo.parallel.background import ReadAhead, num_workers, pinned, to_device
from compactlm_nemo.parallel.collectives import all_gather, all_gather_objects, broadcast, send_receive
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.parallel.world import launch_rank
from compactlm_nemo.training.batches import Batch


class Teacher:
    """A source of targets; collective."""

    def expect(self, samples: list[range]) -> None:
        """Begin to fetch what micro-batches of these samples will need, in this order; no need is without effect."""

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        """Return micro-batches' targets, tokens in order ``[S / cp, B]``; empty before the last stage. Collective."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads that fetch, if any."""


class LiveTeacher(Teacher):
    """A model on the student's mesh, which runs forward over the micro-batches of a step.

    Args:
        chunks: This rank's part of the teacher.
        on_input: Called with the number of the micro-batch that a chunk starts, None for one that only fills the
            schedule.
    """

    def __init__(self, chunks: ModelChunks, on_input: Callable[[int | None], None] | None = None) -> None:
        self.chunks, self.on_input = chunks.eval(), on_input

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        """Return the teacher's final normed hidden states with its output weights."""
        inputs = [batch.tokens_BT[:, :-1] for batch in batches]
        hidden = forward_each(self.chunks, inputs, lambda idx, hidden_SBG: hidden_SBG, self.on_input)
        return [TeacherHead(hidden_SBG.flatten(0, 1), self.chunks.head_weight) for hidden_SBG in hidden]


class OwnMeshTeacher(Teacher):
    """A model on a mesh of its own over the student's processes, with its own tensor- and pipeline-parallel sizes.

    The micro-batches of all the student's data-parallel ranks are dealt out to the teacher's, neighbours together.
    Hidden states go to the ranks that compare them alone: from the teacher's last stage to the student's last stage of
    these samples, there to the first tensor-parallel rank, and from it to the others; where one of these has computed
    the state, from that one. Neither mesh may be context parallel.

    Args:
        chunks: This rank's part of the teacher on its mesh.
        mesh: The student's mesh.
        head_weight: ``[V, G]``, the teacher's output weights as the student's mesh shards them; None before the
            student's last stage.
    """

    def __init__(self, chunks: ModelChunks, mesh: Mesh, head_weight: Tensor | None) -> None:
        self.chunks, self.mesh, self.head_weight = chunks.eval(), mesh, head_weight
        self.teacher_mesh = teacher_mesh = chunks.mesh
        self.is_source = teacher_mesh.is_last_stage and teacher_mesh.tp_rank == 0
        ranks = all_gather_objects(
            (teacher_mesh.dp_rank if self.is_source else None, mesh.dp_rank if mesh.is_last_stage else None)
        )
        self.source_rank = {dp_rank: rank for rank, (dp_rank, _) in enumerate(ranks) if dp_rank is not None}
        """The teacher's data-parallel rank -> the global rank that has its hidden states."""
        self.target_ranks = [
            [rank for rank, (_, at) in enumerate(ranks) if at == dp_rank] for dp_rank in range(mesh.dp_size)
        ]
        """The student's data-parallel rank -> the global ranks that compare its hidden states, tensor parallel."""

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
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
        dealt = -(-len(batches) // teacher_mesh.dp_size)  # all of the teacher's ranks run equally many
        turns = range(teacher_mesh.dp_rank * dealt, (teacher_mesh.dp_rank + 1) * dealt)
        inputs = [batches[min(turn, len(batches) - 1)][:, :-1] for turn in turns]
        with teacher_mesh.active():
            computed = forward_each(self.chunks, inputs, lambda idx, hidden_SBG: hidden_SBG)
        config, (num, size, length) = self.chunks[0].config, tokens_MBT.shape
        blank_SBG = tokens_MBT.new_empty((length - 1, size, config.hidden_size), dtype=config.params_dtype)
        states = dict(zip(turns, computed, strict=True)) if self.is_source else {}
        return self._delivered(states, len(batches), num, dealt, blank_SBG)

    def _delivered(
        self, states: dict[int, Tensor], num_batches: int, num: int, dealt: int, like: Tensor
    ) -> list[Tensor]:
        """Send what this rank has computed, and return the states of its own micro-batches; none before the last stage.

        Args:
            states: Number among all micro-batches -> hidden states; numbers from `num_batches` on only fill up.
            num: Micro-batches of a data-parallel rank of the student.
            dealt: Micro-batches of a data-parallel rank of the teacher.
            like: Gives shape, dtype and device of hidden states.
        """
        mesh, rank = self.mesh, launch_rank()
        sources = [self.source_rank[turn // dealt] for turn in range(num_batches)]
        targets = [self.target_ranks[turn // num] for turn in range(num_batches)]
        roots = [source if source in ranks else ranks[0] for source, ranks in zip(sources, targets, strict=True)]
        sends = [(states[turn], root) for turn, root in enumerate(roots) if sources[turn] == rank != root]
        awaited = [turn for turn, root in enumerate(roots) if root == rank != sources[turn]]
        received = send_receive(sends, [sources[turn] for turn in awaited], like)
        states = states | dict(zip(awaited, received, strict=True))
        local = [turn for turn, ranks in enumerate(targets) if rank in ranks]
        if mesh.tp_size == 1:
            return [states[turn] for turn in local]
        return [broadcast(states.get(turn, like), roots[turn], mesh.tp_group) for turn in local]


class NoTeacher(Teacher):
    """The source for a training on the labels alone."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        """Return targets that hold nothing but the number of tokens."""
        counts = [context_share(batch.tokens_BT[:, 1:], self.mesh).numel() for batch in batches]
        return [NoTargets(count) for count in counts] if self.mesh.is_last_stage else []


class StoredTeacher(Teacher):
    """A source that reads targets from disk, without a teacher in memory; threads decode them ahead of the step.

    On the device are the targets of one micro-batch, when its loss is due; on the host those of a few micro-batches.
    """

    def __init__(self, store: StoredTargets, mesh: Mesh) -> None:
        self.store, self.mesh, self.length = store, mesh, int(store.metadata["sequence_length"])
        self.is_marked = bool(store.metadata.get("is_marked", False))
        workers = num_workers()
        self._decoded: ReadAhead[Sequence[int], list[Tensor]] = ReadAhead(
            self._decode, workers=workers, ahead=2 * workers
        )

    def expect(self, samples: list[range]) -> None:
        if self.mesh.is_last_stage:
            self._decoded.expect(samples)

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        """Return the stored targets, each of which is fetched when it is asked for, on the last stage."""
        return _WhenAsked(self._fetch, batches if self.mesh.is_last_stage else [])

    def close(self) -> None:
        self._decoded.close()

    def of_record(self, record: bytes, tokens: int) -> tuple[Tensor, ...]:
        """Decode the record of `tokens` tokens to tensors ``[tokens, ...]``."""
        raise NotImplementedError

    def of_sample(self, record: bytes) -> tuple[Tensor, ...]:
        """Decode one sample's record to tensors ``[T, ...]``."""
        if not self.is_marked:
            return self.of_record(record, self.length)
        counts_T, record = split_record(record, self.length)
        return tuple(spread(field, counts_T) for field in self.of_record(record, int(counts_T.sum())))

    def as_targets(self, fields: list[Tensor]) -> Targets:
        """Return a micro-batch's targets of its tensors ``[N, ...]`` on the device."""
        raise NotImplementedError

    def _decode(self, samples: Sequence[int]) -> list[Tensor]:
        """Return this rank's tokens ``[N, ...]`` of a micro-batch, in pinned memory; called by threads."""
        records = [self.of_sample(self.store.record(sample)) for sample in samples]
        fields = [torch.stack(field) for field in zip(*records, strict=True)]
        shares = [context_share(field, self.mesh).transpose(0, 1).flatten(0, 1) for field in fields]
        return [pinned(share.contiguous()) for share in shares]

    def _fetch(self, batch: Batch) -> Targets:
        if (length := batch.tokens_BT.shape[1] - 1) != self.length:
            raise DataError(
                f"{self.store.folder} holds samples of {self.length} tokens, training has {length}; cache the teacher "
                "again."
            )
        return self.as_targets([to_device(field) for field in self._decoded.take(batch.samples)])


class _WhenAsked(Sequence[Targets]):
    """The targets of micro-batches, each fetched when it is asked for."""

    def __init__(self, fetch: Callable[[Batch], Targets], batches: list[Batch]) -> None:
        self.fetch, self.batches = fetch, batches

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, idx: int) -> Targets: ...
    @overload
    def __getitem__(self, idx: slice) -> Sequence[Targets]: ...
    def __getitem__(self, idx: int | slice) -> Targets | Sequence[Targets]:
        if isinstance(idx, slice):
            return _WhenAsked(self.fetch, self.batches[idx])
        return self.fetch(self.batches[idx])


class StoredTopK(StoredTeacher):
    """A source that reads the teacher's likeliest tokens."""

    def __init__(self, store: StoredTargets, mesh: Mesh) -> None:
        super().__init__(store, mesh)
        self.k = int(store.metadata["k"])

    def of_record(self, record: bytes, tokens: int) -> tuple[Tensor, ...]:
        return decode_top_k(record, tokens, self.k)

    def as_targets(self, fields: list[Tensor]) -> Targets:
        return TopK(*fields)


class StoredHidden(StoredTeacher):
    """A source that reads final hidden states; only the teacher's output weights are in memory.

    Args:
        head_weight: ``[V, G]``, this rank's rows, in the dtype of the stored states; None before the last stage.
    """

    def __init__(self, store: StoredTargets, mesh: Mesh, head_weight: Tensor | None) -> None:
        super().__init__(store, mesh)
        self.head_weight = head_weight

    def of_record(self, record: bytes, tokens: int) -> tuple[Tensor, ...]:
        assert self.head_weight is not None
        return (decode_hidden(record, tokens, self.head_weight.shape[1], self.head_weight.dtype),)

    def as_targets(self, fields: list[Tensor]) -> Targets:
        assert self.head_weight is not None
        (hidden_NG,) = fields
        return TeacherHead(hidden_NG, self.head_weight)
