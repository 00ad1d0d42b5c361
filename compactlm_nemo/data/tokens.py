"""Turns text into tokens: JSON lines in, a Megatron indexed dataset (`PREFIX.bin`, `PREFIX.idx`) out.

Chats have a mask beside them, `PREFIX.mask` (`data.answer_mask`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from compactlm_nemo.config.data import DataConfig
from compactlm_nemo.data.answer_mask import SUFFIX, AnswerMaskWriter
from compactlm_nemo.data.chat import ChatEncoder, Encoded
from compactlm_nemo.errors import DataError

_BATCH_DOCUMENTS = 512


class Counts(NamedTuple):
    """What a corpus holds."""

    tokens: int
    """Tokens, ends of documents included."""
    answer_tokens: int
    """Tokens whose prediction counts: those of answers, and all of plain text."""


def tokenize_corpus(
    path: Path,
    prefix: Path,
    tokenizer: Any,
    eod: int,
    vocab_size: int | None = None,
    *,
    chat_template: str | None = None,
    keeps_apart: bool = False,
) -> Counts:
    """Tokenise every line; each document is its tokens followed by `eod`.

    Args:
        path: JSON lines, each an object with a non-empty string `text`, whose tokens are without special ones, with
            `messages`, or with `prompt` and `completion` (`data.chat`); blank lines are skipped.
        prefix: `PREFIX.bin`, `PREFIX.mask` where there are chats, and `PREFIX.idx` appear when everything is written
            (the index last), or not at all.
        tokenizer: A Hugging Face tokenizer.
        eod: End-of-document token.
        vocab_size: Ids must be in [0, vocab_size): rows of the model, or None for the tokenizer's length.
        chat_template: Takes the place of the tokenizer's.
        keeps_apart: Attention will begin anew behind every `eod`, so no chat may hold one but at its end.
    Returns:
        Number of tokens, which are uint16 when the vocabulary allows, else int32.
    """
    vocab_size = min(len(tokenizer), vocab_size or len(tokenizer))
    if not 0 <= eod < vocab_size:
        raise DataError(f"{path}: end-of-document token {eod} is outside the vocabulary of {vocab_size} tokens.")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a JSON-lines file with a `text` field.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{prefix}.{os.getpid()}.tmp"
    num_tokens = 0
    suffixes = (".bin", SUFFIX, ".idx")
    encoder = ChatEncoder(tokenizer, eod, chat_template)
    try:
        mask = AnswerMaskWriter(Path(f"{temporary}{SUFFIX}"))
        builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=DType.optimal_dtype(vocab_size))
        try:
            for line, document in _token_documents(path, encoder):
                _check_ids(document.ids, vocab_size, path, line)
                if keeps_apart and document.mask is not None and eod in document.ids[:-1]:
                    raise DataError(
                        f"{path}:{line} holds the end-of-text token {eod} within a chat, which "
                        "data.mask_documents=true would cut there; set mask_documents=false, or give the tokenizer an "
                        "<|endoftext|> of its own."
                    )
                builder.add_document(torch.tensor(document.ids, dtype=torch.int64), [len(document.ids)])
                mask.add(len(document.ids), document.mask)
                num_tokens += len(document.ids)
            if num_tokens == 0:
                raise DataError(f"{path} holds no document; give a JSON-lines file with a `text` field.")
            builder.finalize(f"{temporary}.idx")
        finally:
            builder.data_file.close()
            mask.close()
        if mask.num_counted == 0:
            raise DataError(f"{path} holds no answer; a chat needs messages of the role assistant.")
        for suffix in suffixes:
            if Path(f"{temporary}{suffix}").exists():
                os.replace(f"{temporary}{suffix}", f"{prefix}{suffix}")
    finally:
        for suffix in suffixes:
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return Counts(num_tokens, mask.num_counted)


def refuse_shared_documents(data: DataConfig) -> None:
    """Raise DataError when a training corpus has a text of a held-out corpus, word for word (JSON-lines corpora)."""
    heldout = {
        _digest(record): f"{corpus.path}:{line}"
        for corpus in data.heldout.values()
        if Path(corpus.path).is_file()
        for line, record in _documents(Path(corpus.path))
    }
    for corpus in data.train.values():
        path = Path(corpus.path)
        for line, record in _documents(path) if path.is_file() and heldout else ():
            if (other := heldout.get(_digest(record))) is not None:
                raise DataError(f"{path}:{line} and {other} hold the same document; take it out of data.train.")


def _digest(record: dict[str, Any]) -> bytes:
    """Return the hash of a text, or of what the chat says."""
    said = record["text"].strip() if "text" in record else json.dumps([record.get(key) for key in _CHATS])
    return hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=16).digest()


def _token_documents(path: Path, encoder: ChatEncoder) -> Iterator[tuple[int, Encoded]]:
    documents = _documents(path)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        texts = [record["text"] for _, record in batch if "text" in record]
        encoded = iter(encoder.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for line, record in batch:
            if "text" in record:
                yield line, Encoded([*next(encoded), encoder.eod], None)
                continue
            try:
                yield line, encoder.encode(record)
            except DataError as error:
                raise DataError(f"{path}:{line} {error}.") from None


_CHATS = ("messages", "prompt", "completion")


def _documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line, which holds a non-empty `text`, or a chat."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except ValueError as error:
                raise DataError(f"{path}:{line} is no JSON ({error}); every line must be a JSON object.") from None
            if isinstance(record, dict) and not record.keys().isdisjoint(("messages", "prompt")):
                if "text" in record or record.keys() >= {"messages", "prompt"}:
                    raise DataError(f"{path}:{line} has two of `text`, `messages` and `prompt`; leave one of them.")
            elif not isinstance(record, dict) or not isinstance(text := record.get("text"), str) or not text:
                raise DataError(
                    f"{path}:{line} has no `text`; every line must be an object with a non-empty `text`, with "
                    "`messages`, or with `prompt` and `completion`."
                )
            yield line, record


def _check_ids(ids: list[int], vocab_size: int, path: Path, line: int) -> None:
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        worst = max(ids) if max(ids) >= vocab_size else min(ids)
        raise DataError(
            f"{path}:{line} gives token {worst}, outside the vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model."
        )
