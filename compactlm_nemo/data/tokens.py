"""Turns text into tokens: JSON lines in, a Megatron indexed dataset (`PREFIX.bin`, `PREFIX.idx`) out."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from compactlm_nemo.config.data import DataConfig
from compactlm_nemo.errors import DataError

_BATCH_DOCUMENTS = 512


def tokenize_corpus(path: Path, prefix: Path, tokenizer: Any, eod: int, vocab_size: int | None = None) -> int:
    """Tokenise every line's `text`; each document is its tokens, without special ones, followed by `eod`.

    Args:
        path: JSON lines, each an object with a non-empty string `text`; blank lines are skipped.
        prefix: `PREFIX.bin` and `PREFIX.idx` appear when everything is written (the index last), or not at all.
        tokenizer: A Hugging Face tokenizer.
        eod: End-of-document token.
        vocab_size: Ids must be in [0, vocab_size): rows of the model, or None for the tokenizer's length.
    Returns:
        Number of tokens, ends of documents included. They are uint16 when the vocabulary allows, else int32.
    """
    vocab_size = min(len(tokenizer), vocab_size or len(tokenizer))
    if not 0 <= eod < vocab_size:
        raise DataError(f"{path}: end-of-document token {eod} is outside the vocabulary of {vocab_size} tokens.")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a JSON-lines file with a `text` field.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{prefix}.{os.getpid()}.tmp"
    num_tokens = 0
    try:
        builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=DType.optimal_dtype(vocab_size))
        try:
            for line, ids in _token_documents(path, tokenizer):
                _check_ids(ids, vocab_size, path, line)
                builder.add_document(torch.tensor([*ids, eod], dtype=torch.int64), [len(ids) + 1])
                num_tokens += len(ids) + 1
            if num_tokens == 0:
                raise DataError(f"{path} holds no document; give a JSON-lines file with a `text` field.")
            builder.finalize(f"{temporary}.idx")
        finally:
            builder.data_file.close()
        for suffix in (".bin", ".idx"):
            os.replace(f"{temporary}{suffix}", f"{prefix}{suffix}")
    finally:
        for suffix in (".bin", ".idx"):
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return num_tokens


def refuse_shared_documents(data: DataConfig) -> None:
    """Raise DataError when a training corpus has a text of a held-out corpus, word for word (JSON-lines corpora)."""
    heldout = {
        _digest(text): f"{corpus.path}:{line}"
        for corpus in data.heldout.values()
        if Path(corpus.path).is_file()
        for line, text in _text_documents(Path(corpus.path))
    }
    for corpus in data.train.values():
        path = Path(corpus.path)
        for line, text in _text_documents(path) if path.is_file() and heldout else ():
            if (other := heldout.get(_digest(text))) is not None:
                raise DataError(f"{path}:{line} and {other} hold the same document; take it out of data.train.")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def _token_documents(path: Path, tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    documents = _text_documents(path)
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip((line for line, _ in batch), encoded, strict=True)


def _text_documents(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except ValueError as error:
                raise DataError(f"{path}:{line} is no JSON ({error}); every line must be a JSON object.") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str) or not text:
                raise DataError(f"{path}:{line} has no `text`; every line must be an object with a non-empty `text`.")
            yield line, text


def _check_ids(ids: list[int], vocab_size: int, path: Path, line: int) -> None:
    if ids and not (0 <= min(ids) and max(ids) < vocab_size):
        worst = max(ids) if max(ids) >= vocab_size else min(ids)
        raise DataError(
            f"{path}:{line} gives token {worst}, outside the vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model."
        )
