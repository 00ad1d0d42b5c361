"""How the teacher writes documents: many at once, and where one ends, the next begins in its place.

The rows of all data-parallel ranks are known to every rank, W of them; each rank runs its B rows. A document depends on
the seed and its number: not on the row, the other documents, the number of ranks, or a kill, but for equal roundings.
Progress is in `progress/generate`: documents that have ended, and the tokens so far of those that grow.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from compactlm_nemo.artifacts import atomic_write_text, sealed, settings_of
from compactlm_nemo.data.tokenizer import load_tokenizer
from compactlm_nemo.losses.sampling import Sampler
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.decoding import Decoding
from compactlm_nemo.parallel.collectives import broadcast_object, last_stage_total
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.interruption import boundary, interrupted
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.stages.context import HF, Run

SAVE_SECONDS = 30.0
_AT_ONCE = 64
"""Tokens of each row that run together where documents go on."""

Documents = dict[int, list[int]]
"""Number of a document -> its tokens, the one that ends it included."""


@dataclass(frozen=True)
class Rules:
    """What a document is."""

    start: int
    """Token before the first, the teacher's own beginning of a text; no part of the document."""
    ends: frozenset[int]
    """Tokens that end one; no document is empty, so none of them is its first."""
    max_tokens: int
    seed: int
    sampler: Sampler


class Writing:
    """`Writing` is the state of the rows: which document each holds, and its tokens.

    Args:
        known: Tokens of documents that go on; they take the first rows.
        documents: Numbers of those to be written, in order.
    """

    def __init__(
        self, model: ModelChunks, decoding: Decoding, rules: Rules, documents: list[int], known: Documents
    ) -> None:
        self._model, self._decoding, self._rules = model, decoding, rules
        self._mesh, num_rows = model.mesh, decoding.num_rows * model.mesh.dp_size
        self.document_W = numpy.full(num_rows, -1)
        """Number of the row's document, -1 without one."""
        self._length_W = numpy.zeros(num_rows, dtype=numpy.int64)
        self._tokens_WT = numpy.zeros((num_rows, rules.max_tokens), dtype=numpy.int64)
        self._uniform_WT = numpy.zeros((num_rows, rules.max_tokens))
        self.new_tokens = 0
        """Tokens written by this launch."""
        self._waiting: Iterator[int] = iter([*known, *(number for number in documents if number not in known)])
        for row in range(num_rows):
            ids = known.get(self._take(row), [])
            self._tokens_WT[row, : len(ids)], self._length_W[row] = ids, len(ids)
        self._read_known()

    @property
    def _own(self) -> slice:
        """Rows of this data-parallel rank."""
        num_rows = self._decoding.num_rows
        return slice(self._mesh.dp_rank * num_rows, (self._mesh.dp_rank + 1) * num_rows)

    def _take(self, row: int) -> int:
        """Let a row hold the next document."""
        number = self.document_W[row] = next(self._waiting, -1)
        self._length_W[row] = 0
        if number >= 0:
            generator = numpy.random.default_rng([self._rules.seed, number, 0])
            self._uniform_WT[row] = generator.random(self._rules.max_tokens)
        return int(number)

    def _read_known(self) -> None:
        """Run all tokens but the last of documents that go on, the start before them."""
        inputs_WT = numpy.roll(self._tokens_WT, 1, axis=1)
        inputs_WT[:, 0] = self._rules.start
        longest = int(self._length_W.max())
        for start in range(0, longest, _AT_ONCE):
            part_BT = inputs_WT[self._own, start : min(start + _AT_ONCE, longest)]
            starts_B = torch.full((len(part_BT),), start)
            self._decoding.extend(torch.from_numpy(part_BT), starts_B, lambda *_: None)

    @property
    def is_done(self) -> bool:
        return bool((self.document_W < 0).all())

    def growing(self) -> Documents:
        """Return the documents that have not ended."""
        rows: list[int] = numpy.flatnonzero(self.document_W >= 0).tolist()
        return {int(self.document_W[row]): self._ids(row) for row in rows}

    def _ids(self, row: int) -> list[int]:
        ids: list[int] = self._tokens_WT[row, : self._length_W[row]].tolist()
        return ids

    def step(self) -> Documents:
        """Give every document its next token, and return those that end with it. Collective."""
        rows_W, rules = numpy.arange(len(self.document_W)), self._rules
        last_W = numpy.where(self._length_W > 0, self._tokens_WT[rows_W, self._length_W - 1], rules.start)
        next_RB = torch.zeros(self._mesh.dp_size, self._decoding.num_rows, dtype=torch.long, device=device())

        def visit(numbers_R: Tensor, hidden_R1H: Tensor) -> None:
            rows_R = numbers_R.numpy() + self._own.start
            is_live_R = torch.from_numpy(self.document_W[rows_R] >= 0)
            if is_live_R.any():
                hidden_NH = hidden_R1H[:, 0][is_live_R.to(hidden_R1H.device)]
                drawn_N = self._draw(rows_R[is_live_R.numpy()], hidden_NH)
                next_RB[self._mesh.dp_rank, numbers_R[is_live_R].to(next_RB.device)] = drawn_N

        starts_B = torch.from_numpy(self._length_W[self._own])
        self._decoding.extend(torch.from_numpy(last_W[self._own])[:, None], starts_B, visit)
        next_W = last_stage_total(next_RB, self._mesh).numpy().reshape(-1)
        live = numpy.flatnonzero(self.document_W >= 0)
        self._tokens_WT[live, self._length_W[live]] = next_W[live]
        self._length_W[live] += 1
        self.new_tokens += len(live)
        has_ended = numpy.isin(next_W[live], list(rules.ends)) | (self._length_W[live] == rules.max_tokens)
        ended = {}
        for row in live[has_ended]:
            ended[int(self.document_W[row])] = self._ids(row)
            self._take(row)
        if ended:
            self._drop_idle_rows()
        return ended

    def _drop_idle_rows(self) -> None:
        """Let the model run fewer rows, where no documents wait for those that are idle."""
        num_before = self._decoding.num_rows
        kept_PB = self._decoding.shrink(torch.from_numpy(self.document_W >= 0).view(self._mesh.dp_size, -1))
        if kept_PB is None:
            return
        rows = (kept_PB + torch.arange(self._mesh.dp_size)[:, None] * num_before).flatten().numpy()
        self.document_W, self._length_W = self.document_W[rows], self._length_W[rows]
        self._tokens_WT, self._uniform_WT = self._tokens_WT[rows], self._uniform_WT[rows]

    def _draw(self, rows_N: Any, hidden_NH: Tensor) -> Tensor:
        """Return the next token of rows' documents, from their last hidden states."""
        places_N, seed = self._length_W[rows_N], self._rules.seed

        def uniforms(numbers_N: Tensor, attempt: int) -> Tensor:
            numbers = numbers_N.numpy()
            if attempt == 0:
                return torch.from_numpy(self._uniform_WT[rows_N[numbers], places_N[numbers]])
            drawn = [
                numpy.random.default_rng([seed, int(self.document_W[row]), 1, int(place)]).random(attempt)[-1]
                for row, place in zip(rows_N[numbers], places_N[numbers], strict=True)
            ]
            return torch.tensor(drawn, dtype=torch.float64)

        is_first_N = torch.from_numpy(places_N == 0)
        ends = torch.tensor(sorted(self._rules.ends))
        return self._rules.sampler.ids(self._model.head(), hidden_NH, uniforms, ends, is_first_N)


def rules_of(run: Run, tokenizer: Any, vocab_size: int) -> Rules:
    """Return what the settings and the tokenizer make a document."""
    cfg = run.config.generate
    ends = frozenset({run.document_end, tokenizer.eos_token_id} - {None})
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = set(tokenizer.get_vocab().values())
    never = (special | set(tokenizer.all_special_ids) | (set(range(vocab_size)) - named)) - ends
    return Rules(
        start=run.document_end if run.window_start is None else run.window_start,
        ends=ends,
        max_tokens=cfg.max_tokens,
        seed=run.config.run.seed if cfg.seed is None else cfg.seed,
        sampler=Sampler(temperature=cfg.temperature, top_p=cfg.top_p, never=torch.tensor(sorted(never)).long()),
    )


def write_documents(run: Run, path: Path) -> dict[str, Any]:
    """Write all documents, in the order of their numbers, as JSON lines; return what the manifest says. Collective."""
    cfg, tokenizer = run.config.generate, load_tokenizer(run.path("teacher") / HF)
    rules = rules_of(run, tokenizer, run.dims("teacher").vocab_size)
    decides = settings_of(run.stage.settings(run.config)) | {"model": run.fingerprint("teacher")}
    state = _State(run.open_progress(decides, are_independent=True))
    missing = [number for number in range(cfg.documents) if number not in state.ended]
    if missing:
        model = run.load("teacher").eval()
        num_rows = min(cfg.batch, -(-len(missing) // run.mesh.dp_size))
        with Decoding(model, num_rows, cfg.max_tokens) as decoding:
            writing = Writing(model, decoding, rules, missing, state.growing)
            _write(writing, state, len(missing))
    results: dict[str, Any] = {}
    with main_rank_writes() as writes:
        if writes:
            results = _finish(path, state, rules, tokenizer)
            shutil.rmtree(run.progress)
    return broadcast_object(results)


def _write(writing: Writing, state: _State, num_documents: int) -> None:
    """Write documents until all have ended."""
    state.begin()
    saved = time.monotonic()
    with progress_bar("generate", num_documents, tokens=lambda: writing.new_tokens) as advance:
        while not writing.is_done:
            ended = writing.step()
            state.ended |= ended
            state.new |= ended
            advance(len(ended))
            number, is_due = boundary(is_main_rank() and time.monotonic() - saved > SAVE_SECONDS)
            if number or is_due:
                with main_rank_writes() as writes:
                    if writes:
                        state.save(writing.growing())
                saved = time.monotonic()
            if number:
                raise interrupted(number, f"{len(state.ended)} documents have ended, those that grow are kept")
    with main_rank_writes() as writes:
        if writes:
            state.save({})


class _State:
    """What has been written so far: files of ended documents, and one of those that grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ended: Documents = {}
        self.growing: Documents = {}
        self.new: Documents = {}
        """Ended documents that are not on disk."""
        self.seconds = 0.0
        """Of all launches, up to what is on disk."""
        self._begun = 0.0
        self._num_files = 0
        found: Any = None
        with main_rank_writes() as writes:
            if writes:
                files = sorted(folder.glob("ended_*.npz"))
                ended = {number: ids for file in files for number, ids in _load(file)[0].items()}
                known = _load(folder / "growing.npz") if (folder / "growing.npz").is_file() else ({}, 0.0)
                num_files = 1 + max((int(file.stem.partition("_")[2]) for file in files), default=-1)
                found = ended, {n: ids for n, ids in known[0].items() if n not in ended}, known[1], num_files
        self.ended, self.growing, self.seconds, self._num_files = broadcast_object(found)

    def begin(self) -> None:
        """Let the time run."""
        self._begun = time.monotonic() - self.seconds

    def save(self, growing: Documents) -> None:
        """Keep what is new on disk; the main rank calls this. A kill in between loses no document."""
        self.seconds = time.monotonic() - self._begun
        if self.new:
            _save(self._folder / f"ended_{self._num_files:06d}.npz", self.new, self.seconds)
            self._num_files, self.new = self._num_files + 1, {}
        _save(self._folder / "growing.npz", growing, self.seconds)


def _save(path: Path, documents: Documents, seconds: float) -> None:
    with sealed(path) as temporary, temporary.open("wb") as file:
        numpy.savez(
            file,
            numbers=numpy.array(list(documents), dtype=numpy.int64),
            lengths=numpy.array([len(ids) for ids in documents.values()], dtype=numpy.int64),
            ids=numpy.array([number for ids in documents.values() for number in ids], dtype=numpy.int32),
            seconds=numpy.array(seconds),
        )


def _load(path: Path) -> tuple[Documents, float]:
    with numpy.load(path) as held:
        ends = numpy.cumsum(held["lengths"])
        parts = numpy.split(held["ids"], ends[:-1]) if len(ends) else []
        return {int(n): ids.tolist() for n, ids in zip(held["numbers"], parts, strict=True)}, float(held["seconds"])


def _finish(path: Path, state: _State, rules: Rules, tokenizer: Any) -> dict[str, Any]:
    """Write the texts of all documents, and return what the manifest says of them."""
    documents = [state.ended[number] for number in sorted(state.ended)]
    bodies = [ids[:-1] if ids[-1] in rules.ends else ids for ids in documents]
    texts = [str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in bodies]
    atomic_write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    again = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    num_ended = sum(ids[-1] in rules.ends for ids in documents)
    num_body, num_tokens = sum(map(len, bodies)), sum(map(len, documents))
    return {
        "documents": len(documents),
        "tokens": num_tokens,
        "ended_by": {"end_of_text": num_ended, "max_tokens": len(documents) - num_ended},
        "seconds": round(state.seconds, 1),
        "tokens_per_second": round(num_tokens / state.seconds, 1) if state.seconds else None,
        "equal_after_tokenising_again": sum(map(_num_equal, bodies, again)) / num_body,
    }


def _num_equal(ids: list[int], again: list[int]) -> int:
    """Return how many tokens a text keeps, in order, where it is tokenised again."""
    if ids == again:
        return len(ids)
    return sum(block.size for block in SequenceMatcher(None, ids, again, autojunk=False).get_matching_blocks())
