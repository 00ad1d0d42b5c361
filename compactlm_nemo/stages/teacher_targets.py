"""The targets of every sample of the training order, computed by the teacher and written to disk in shards.

Shards are written to `progress/cache_teacher` until all are there; a killed run goes on with those that are missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.artifacts import atomic_write_text, settings_of
from compactlm_nemo.config.fingerprint import result_settings, training_text
from compactlm_nemo.config.teacher import StoredKind
from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.data.windows import Windows
from compactlm_nemo.distill.stored_targets import (
    METADATA,
    StoredTargets,
    TopKRecord,
    counted_record,
    encode_hidden,
    encode_top_k,
    num_shards,
    shard_path,
    write_shard,
)
from compactlm_nemo.losses.targets import top_k_targets
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each, micro_batches
from compactlm_nemo.models.layout import gathered_positions
from compactlm_nemo.parallel.background import Workers, num_workers, pinned, to_device, to_host
from compactlm_nemo.parallel.collectives import all_gather, barrier, broadcast_object
from compactlm_nemo.parallel.interruption import stop_if_asked
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.stages.context import Run


def store_targets(run: Run, folder: Path) -> dict[str, Any]:
    """Write the shards of stored targets, and `targets.json`.

    Data-parallel ranks take every dp-th missing shard; all run in step, as spread experts need.
    """
    config, mesh, dims = run.config, run.mesh, run.dims("teacher")
    samples, length = config.cached_samples, config.data.sequence_length
    metadata = {
        "kind": config.cache.kind.name, "k": config.cache.k, "width": dims.hidden_size, "samples": samples,
        "shard_samples": config.cache.shard_samples, "sequence_length": length,
        "mask_documents": config.data.mask_documents,
        "model": run.fingerprint(run.teaching_artifact),
    }  # fmt: skip
    windows = Windows(run.train_corpora(), length, config.run.seed)
    if windows.is_marked:  # the predictions that count are stored alone
        metadata["is_marked"] = True
    state = run.open_progress(
        settings_of({"cache": result_settings(config.cache), "targets": metadata} | training_text(config)),
        are_independent=True,
    )
    every = range(num_shards(samples, config.cache.shard_samples))
    missing = broadcast_object([shard for shard in every if not shard_path(state, shard).exists()])
    teacher = run.load(run.teaching_artifact).eval()
    with (
        progress_bar("cache teacher", len(missing) * config.cache.shard_samples, length) as advance,
        closing(ShardWriter(state)) as writer,
    ):
        for first in range(0, len(missing), mesh.dp_size):
            turn = missing[first : first + mesh.dp_size]
            shard = turn[min(mesh.dp_rank, len(turn) - 1)]
            numbers = range(samples)[shard * config.cache.shard_samples :][: config.cache.shard_samples]
            tokens_NT = torch.stack([windows.sample(number) for number in numbers])
            if len(numbers) < config.cache.shard_samples:  # the last shard: all ranks run equally many batches
                filler = tokens_NT[-1:].expand(config.cache.shard_samples - len(numbers), -1)
                tokens_NT = torch.cat([tokens_NT, filler])
            records = _records(run, teacher, dims, tokens_NT, writer, is_marked=windows.is_marked)[: len(numbers)]
            if records and mesh.dp_rank < len(turn):
                writer.write(shard, records)
            advance(len(turn) * config.cache.shard_samples)
            stop_if_asked(f"{first + len(turn)} of {len(missing)} shards are made")
        writer.finish()
    barrier()
    with main_rank_writes() as writes:
        if writes:
            for path in sorted(state.glob("shard_*.safetensors")):
                path.replace(folder / path.name)
            atomic_write_text(folder / METADATA, json.dumps(metadata, indent=2) + "\n")
            shutil.rmtree(state)
    num_bytes = broadcast_object(StoredTargets(folder).num_bytes() if is_main_rank() else 0)
    return {"samples": samples, "bytes": num_bytes, "bytes_per_token": num_bytes / (samples * length)}


class ShardWriter:
    """Encodes records and writes shards beside the teacher, whose next micro-batch the device computes meanwhile.

    Shards appear in the order of `write`. At most two records a thread are waiting to be encoded; the teacher waits
    for more. What a thread raises is raised by the next `write`, or by `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        workers = num_workers()
        self._encoders, self._writer = Workers(workers, most_pending=3 * workers), Workers(1)
        self._written: list[Future[None]] = []

    def encode(self, encode: Callable[[], bytes]) -> Future[bytes]:
        """Begin to encode a record; wait before that while too many are in line."""
        return self._encoders.submit(encode)

    def write(self, shard: int, records: list[Future[bytes]]) -> None:
        """Write a shard as soon as its records are encoded."""
        self._raise_errors([job for job in self._written if job.done()])
        self._written.append(
            self._writer.submit(lambda: write_shard(self.folder, shard, [record.result() for record in records]))
        )

    def finish(self) -> None:
        """Return when every shard is on disk."""
        self._raise_errors(self._written)

    def close(self) -> None:
        """Return when no thread is left; shards that are not on disk then are not written."""
        self._encoders.close()
        self._writer.close()

    def _raise_errors(self, jobs: list[Future[None]]) -> None:
        for job in jobs:
            job.result()
        self._written = [job for job in self._written if job not in jobs]


def _records(
    run: Run, teacher: ModelChunks, dims: Dims, tokens_NT: Tensor, writer: ShardWriter, *, is_marked: bool
) -> list[Future[bytes]]:
    """Begin to encode the record of each sample, on one rank of those that share the sample; nothing on the others."""
    config, mesh = run.config, run.mesh
    counts = [counts_of(batch) if is_marked else None for batch in micro_batches(tokens_NT, config.cache.micro_batch)]
    batches = micro_batches(to_device(pinned(tokens_NT)), config.cache.micro_batch)
    is_writer = mesh.tp_rank == 0 and mesh.cp_rank == 0

    def visit(idx: int, hidden_SBG: Tensor) -> list[Future[bytes]]:
        if mesh.cp_size > 1:
            order = gathered_positions(len(hidden_SBG), mesh.cp_size, hidden_SBG.device).argsort()
            hidden_SBG = all_gather(hidden_SBG, mesh.cp_group, dim=0)[order]
        if config.cache.kind is StoredKind.hidden:
            if not is_writer:
                return []
            hidden = to_host(hidden_SBG)
            return [writer.encode(partial(_hidden_record, hidden, b, counts[idx])) for b in range(hidden_SBG.shape[1])]
        labels_N = ids_of(batches[idx][:, 1:]).flatten()
        targets = top_k_targets(hidden_SBG.transpose(0, 1).flatten(0, 1), teacher.head(), labels_N, k=config.cache.k)
        if not is_writer:
            return []
        fields, length = [to_host(field) for field in targets], len(hidden_SBG)
        return [
            writer.encode(partial(_top_k_record, fields, b, length, counts[idx])) for b in range(hidden_SBG.shape[1])
        ]

    results = forward_each(teacher, [batch[:, :-1] for batch in batches], visit)
    return [record for batch in results for record in batch]


def _hidden_record(hidden: Callable[[], Tensor], sample: int, counts_BT: Tensor | None) -> bytes:
    """Encode one sample of ``[S, B, G]``, of the tokens that count where these are given, ``[B, S + 1]``."""
    hidden_SG = hidden()[:, sample]
    if counts_BT is None:
        return encode_hidden(hidden_SG)
    counts_S = counts_BT[sample, :-1]
    return counted_record(counts_S, encode_hidden(hidden_SG[counts_S]))


def _top_k_record(fields: list[Callable[[], Tensor]], sample: int, length: int, counts_BT: Tensor | None) -> bytes:
    """Encode one sample of fields ``[B * S, ...]``, of the tokens that count where these are given, ``[B, S + 1]``."""
    of_sample = [field()[sample * length :][:length] for field in fields]
    if counts_BT is None:
        return encode_top_k(TopKRecord(*of_sample))
    counts_S = counts_BT[sample, :-1]
    return counted_record(counts_S, encode_top_k(TopKRecord(*(field[counts_S] for field in of_sample))))
