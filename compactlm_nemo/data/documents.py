"""Turns the records of a piece into tokens and masks, and counts what was amiss with them.

A plain text is tokenised without special tokens; `data.chat` does chats and prompts with completions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compactlm_nemo.data.chat import ChatEncoder, Encoded
from compactlm_nemo.data.records import Piece, Record
from compactlm_nemo.errors import DataError

EMPTY = "empty, skipped"
HALF_CHARACTERS = "with halves of characters, replaced by U+FFFD"
SPECIAL_TOKENS = "that spell special tokens"
INNER_ENDS = "with the token that ends documents inside"

_CHATS = ("messages", "prompt", "completion")
_BATCH_DOCUMENTS = 512
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(kw_only=True)
class EncodedPiece:
    """The documents of a piece."""

    documents: list[Encoded] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of each, 16 bytes of what it says."""
    numbers: list[int] = field(default_factory=list)
    """Of each, its line or row."""
    troubles: Counter[str] = field(default_factory=Counter)
    """Records with a kind of trouble."""


@dataclass(kw_only=True)
class DocumentEncoder:
    """Turns records into documents, each its tokens with `eod` behind them."""

    tokenizer: Any
    """A Hugging Face tokenizer."""
    eod: int
    vocab_size: int | None = None
    """Ids must be in [0, vocab_size): rows of the model, or None for the tokenizer's length."""
    key: str = "text"
    """Where the text of a record is."""
    chat_template: str | None = None
    """Takes the place of the tokenizer's."""
    parses_special_tokens: bool = False
    """Whether a plain text that spells a special token becomes that token."""
    keeps_apart: bool = False
    """Attention will begin anew behind every `eod`, so no chat may hold one but at its end."""
    refused: Mapping[bytes, str] = field(default_factory=dict)
    """Digests of documents that must not occur, each with the place where it stands already."""
    new_ids: Mapping[int, int] | None = None
    """Id of the tokenizer -> id of the model with a trimmed vocabulary, of its tokens; None where they are the same."""

    @cached_property
    def num_tokens(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return min(len(self.tokenizer), self.vocab_size or len(self.tokenizer))

    @property
    def num_new_tokens(self) -> int:
        """Size of the vocabulary of what `encode` returns."""
        return self.num_tokens if self.new_ids is None else len(self.new_ids)

    @cached_property
    def _chats(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, self.eod, self.chat_template)

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in names)) if names else None

    def encode(self, piece: Piece) -> EncodedPiece:
        """Return the documents of a piece; the result depends on the piece alone.

        Raises:
            DataError: a record is no document, gives a token outside the vocabulary, or is refused.
        """
        out = EncodedPiece()
        for start in range(0, len(piece.records), _BATCH_DOCUMENTS):
            batch = [self._checked(piece, record, out) for record in piece.records[start : start + _BATCH_DOCUMENTS]]
            records = [record for record in batch if record is not None]
            texts = iter(self._encode_texts([r.fields[self.key] for r in records if not _is_chat(r)], out))
            for record in records:
                document = self._encode_chat(piece, record) if _is_chat(record) else Encoded(next(texts), None)
                self._add(piece, record, document, out)
        return out

    def _checked(self, piece: Piece, record: Record, out: EncodedPiece) -> Record | None:
        """Return a record with whole characters, None for an empty one."""
        where, fields = piece.where(record.number), record.fields
        text = fields.get(self.key)
        if _is_chat(record):
            if text is not None or fields.keys() >= {"messages", "prompt"}:
                raise DataError(f"{where} has two of `{self.key}`, `messages` and `prompt`; leave one of them.")
        elif self.key not in fields or not isinstance(text, str | None):
            raise DataError(
                f"{where} has no `{self.key}`; every record must be an object with a `{self.key}`, with `messages`, or "
                "with `prompt` and `completion`, or name another key: {path: PATH, key: NAME}."
            )
        elif not text or not text.strip():
            out.troubles[EMPTY] += 1
            return None
        used = {key: fields[key] for key in (self.key, *_CHATS, "tools") if fields.get(key) is not None}
        whole = _whole(used)
        out.troubles[HALF_CHARACTERS] += whole != used
        return Record(whole, record.number)

    def _encode_texts(self, texts: list[str], out: EncodedPiece) -> list[list[int]]:
        """Tokenise plain texts, each with the token that ends it."""
        out.troubles[SPECIAL_TOKENS] += sum(self._spells_special(text) for text in texts)
        return [[*ids, self.eod] for ids in self.plain_ids(texts)]

    def plain_ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenise plain texts; those that spell special tokens by themselves, as the setting has it."""
        literal = [self._spells_special(text) and not self.parses_special_tokens for text in texts]
        encoded = {}
        for is_literal in (False, True):
            given = [text for text, flag in zip(texts, literal, strict=True) if flag is is_literal]
            options = {"split_special_tokens": True} if is_literal else {}
            ids = (
                self.tokenizer(given, add_special_tokens=False, verbose=False, **options)["input_ids"] if given else []
            )
            encoded[is_literal] = iter(ids)
        return [next(encoded[flag]) for flag in literal]

    def _spells_special(self, text: str) -> bool:
        return self._specials is not None and self._specials.search(text) is not None

    def _encode_chat(self, piece: Piece, record: Record) -> Encoded:
        try:
            return self._chats.encode(record.fields)
        except DataError as error:
            raise DataError(f"{piece.where(record.number)} {error}.") from None

    def _add(self, piece: Piece, record: Record, document: Encoded, out: EncodedPiece) -> None:
        where, ids = piece.where(record.number), document.ids
        if not (0 <= min(ids) and max(ids) < self.num_tokens):
            worst = max(ids) if max(ids) >= self.num_tokens else min(ids)
            raise DataError(
                f"{where} gives token {worst}, outside the vocabulary of {self.num_tokens}; "
                "use the tokenizer that belongs to the model."
            )
        has_inner_end = self.eod in ids[:-1]
        if self.keeps_apart and document.mask is not None and has_inner_end:
            raise DataError(
                f"{where} holds the end-of-text token {self.eod} within a chat, which data.mask_documents=true would "
                "cut there; set mask_documents=false, or another token of the tokenizer as data.document_end."
            )
        digest = _digest(record.fields, self.key)
        if (other := self.refused.get(digest)) is not None:
            raise DataError(f"{where} and {other} hold the same document; take it out of data.train.")
        out.troubles[INNER_ENDS] += has_inner_end
        out.documents.append(document if self.new_ids is None else document._replace(ids=self._new(where, ids)))
        out.digests.append(digest)
        out.numbers.append(record.number)

    def _new(self, where: str, ids: list[int]) -> list[int]:
        """Return ids of the trimmed vocabulary; refuse a token that it has not."""
        assert self.new_ids is not None
        lacking = [number for number in ids if number not in self.new_ids]
        if lacking:
            raise DataError(
                f"{where} needs the token {self.tokenizer.convert_ids_to_tokens(lacking[0])!r}, one of {len(lacking)} "
                "that the trimmed vocabulary has not; add this text to model.vocab_texts."
            )
        return [self.new_ids[number] for number in ids]


def _is_chat(record: Record) -> bool:
    return not record.fields.keys().isdisjoint(("messages", "prompt"))


def _whole(value: Any) -> Any:
    """Return the value with U+FFFD for every half of a surrogate pair in its texts."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(inner) for key, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value


def _digest(fields: dict[str, Any], key: str) -> bytes:
    """Return the hash of a text, or of what the chat says."""
    said = fields[key].strip() if key in fields else json.dumps([fields.get(name) for name in _CHATS])
    return hashlib.blake2b(said.encode(), digest_size=16).digest()
