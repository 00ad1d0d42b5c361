"""Trims a tokenizer to the tokens that texts use: those texts are tokenised as before, others spelled with what stays.

Why these texts keep their tokens. BPE merges the neighbours of the lowest rank until none can be merged. Nothing merges
across the borders of a token that is left at the end, so what happens inside them is what happens to the token's
letters alone. The tokens on that way (`_on_the_way`) are kept, so every merge that the whole tokenizer does is still
there, in the same order, and as merges only go, none comes before it. A Unigram takes the best path, which stays the
best of fewer; the worst piece is kept, as the price of an unknown letter hangs on it. Words are looked up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import write_json
from compactlm_nemo.data.documents import SPECIAL_TOKENS, DocumentEncoder
from compactlm_nemo.data.records import Piece
from compactlm_nemo.errors import CheckpointError

UNTRIMMED = "untrimmed"
"""Folder in the artifact of a trimmed teacher: the small files as they were, with the whole tokenizer."""
VOCABULARY = "vocabulary.json"
"""File beside it: the `TrimmedVocabulary`."""
KINDS = ("BPE", "WordLevel", "Unigram")
"""Models of tokenizer.json that can be trimmed."""


@dataclass(frozen=True, kw_only=True)
class TrimmedVocabulary:
    """The tokens that stay; number i of them has id i from then on."""

    ids: list[int]
    """Their ids before, ascending."""
    whole_size: int
    """Rows of the model before."""

    @property
    def rows(self) -> list[int]:
        """Rows of the model that stay: tokens that only the tokenizer had come last and have none."""
        return [number for number in self.ids if number < self.whole_size]

    @property
    def new_ids(self) -> dict[int, int]:
        """Id before -> id, of the tokens that have a row."""
        return {number: new for new, number in enumerate(self.rows)}

    def save(self, folder: Path) -> None:
        write_json(folder / VOCABULARY, asdict(self))

    @staticmethod
    def load(folder: Path) -> TrimmedVocabulary | None:
        """Return the vocabulary of a teacher's artifact; None where it is whole."""
        path = folder / VOCABULARY
        return TrimmedVocabulary(**json.loads(path.read_text())) if path.is_file() else None


def trim_problem(hf_assets: Path) -> str | None:
    """Return why the tokenizer of a folder cannot be trimmed; None where it can."""
    path = hf_assets / "tokenizer.json"
    if not path.is_file():
        return f"model.vocab_texts needs a tokenizer.json, which {hf_assets} has not; add it, or leave vocab_texts out."
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        kind = model.get("type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is damaged; fetch it again."
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if kind in KINDS and not odd:
        return None
    what = f"a {kind} model" if kind not in KINDS else f"a model with {odd[0]}"
    return f"model.vocab_texts cannot trim {path}, {what}; it trims {', '.join(KINDS)}: leave vocab_texts out."


def used_ids(encoder: DocumentEncoder, pieces: Iterable[Piece]) -> set[int]:
    """Return the ids in texts, of either reading where a text spells a special token."""
    used: set[int] = set()
    for piece in pieces:
        encoded = encoder.encode(piece)
        used.update(number for document in encoded.documents for number in document.ids)
        if encoded.troubles[SPECIAL_TOKENS]:
            encoder.parses_special_tokens = not encoder.parses_special_tokens
            used.update(number for document in encoder.encode(piece).documents for number in document.ids)
            encoder.parses_special_tokens = not encoder.parses_special_tokens
    return used


def kept_ids(tokenizer: Mapping[str, Any], used: Iterable[int], template: str = "") -> list[int]:
    """Return the ids that stay, ascending: `used` ones, those that a tokenizer needs, and those on the way to them.

    Needed are special tokens, others that were added and that the chat template spells, what the post-processor puts,
    the unknown token, and bytes, so that any text can still be spelled.

    Args:
        tokenizer: The content of tokenizer.json.
        used: Ids of texts and of configs; what the tokenizer does not know is passed over.
        template: The chat template.
    """
    model = tokenizer["model"]
    ids = _ids(tokenizer)
    names = {number: token for token, number in ids.items()}
    added = tokenizer.get("added_tokens") or []
    kept = {names[number] for number in used if number in names}
    kept |= {token["content"] for token in added if token["special"] or token["content"] in template}
    kept |= {names[number] for number in _placed(tokenizer) if number in names}
    kept |= _spelling(tokenizer) & ids.keys()
    if model["type"] == "BPE":
        ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        kept |= {part for token in list(kept) for part in _on_the_way(token, ranks)} & ids.keys()
    return sorted(ids[token] for token in kept)


def trimmed(tokenizer: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the content of tokenizer.json with the tokens of `kept` alone; `kept[i]` has id i.

    Raises:
        CheckpointError: the library would give the tokens other ids.
    """
    result: dict[str, Any] = deepcopy(dict(tokenizer))
    new = {number: idx for idx, number in enumerate(kept)}
    model = result["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][number] for number in kept if number < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[number] for token, number in model["vocab"].items() if number in new}
    if model["type"] == "BPE":
        vocab = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if a in vocab and b in vocab and a + b in vocab]
    result["added_tokens"] = [
        token | {"id": new[token["id"]]} for token in result.get("added_tokens") or [] if token["id"] in new
    ]
    for holder, key in _places(result):
        holder[key] = [new[n] for n in holder[key]] if isinstance(holder[key], list) else new[holder[key]]
    _check_ids(result)
    return result


def _check_ids(tokenizer: Mapping[str, Any]) -> None:
    """Refuse a file to whose tokens the library gives other ids than the file says."""
    from tokenizers import Tokenizer

    if Tokenizer.from_str(json.dumps(tokenizer)).get_vocab(with_added_tokens=True) != _ids(tokenizer):
        raise CheckpointError(
            "model.vocab_texts: the tokenizer's ids have gaps, which it cannot be trimmed with; leave vocab_texts out."
        )


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token, added ones too."""
    vocab = tokenizer["model"]["vocab"]
    ids = {piece: number for number, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that are merged, by rank; files have them as lists or as words."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(first, second) for first, second in pairs]


def _on_the_way(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the tokens that BPE makes of a token's letters until it is whole; none where it never is."""
    parts, made = list(token), set(token)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, math.inf), idx) for idx, pair in enumerate(pairwise(parts)))
        if rank == math.inf:
            return set()
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        made.add(parts[place])
    return made


def _spelling(tokenizer: Mapping[str, Any]) -> set[str]:
    """Return the tokens with which everything can be spelled, as far as the tokenizer has them."""
    from tokenizers.pre_tokenizers import ByteLevel

    model = tokenizer["model"]
    needed = {model["unk_token"]} if model.get("unk_token") is not None else set()
    if model.get("byte_fallback"):
        needed |= {f"<0x{byte:02X}>" for byte in range(256)}
    elif "ByteLevel" in _types(tokenizer.get("pre_tokenizer")):
        needed |= set(ByteLevel.alphabet())
    if model["type"] == "Unigram":
        needed.add(min(model["vocab"], key=lambda piece: piece[1])[0])
        needed |= {model["vocab"][model["unk_id"]][0]} if model.get("unk_id") is not None else set()
    return needed


def _types(part: Any) -> set[str]:
    """Return the types of a part of tokenizer.json and of the parts in it."""
    if isinstance(part, list):
        return {kind for each in part for kind in _types(each)}
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | {kind for value in part.values() for kind in _types(value)}


def _placed(tokenizer: Mapping[str, Any]) -> set[int]:
    """Return the ids that stand in tokenizer.json outside of the vocabulary."""
    values = [holder[key] for holder, key in _places(tokenizer)]
    return {number for value in values for number in (value if isinstance(value, list) else [value])}


def _places(tokenizer: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield where ids stand outside of the vocabulary: of the post-processor, and of padding."""
    if tokenizer.get("padding"):
        yield tokenizer["padding"], "pad_id"
    processors = [tokenizer.get("post_processor") or {}]
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", [])
        for special in (processor.get("special_tokens") or {}).values():
            yield special, "ids"
        for end in ("sep", "cls"):
            if end in processor:
                yield processor[end], 1


def other_place(
    whole: DocumentEncoder, trimmed: DocumentEncoder, new_ids: Mapping[int, int], piece: Piece
) -> str | None:
    """Return where the first document of a piece stands that the trimmed tokenizer splits otherwise; None without."""
    before, after = whole.encode(piece), trimmed.encode(piece)
    for old, new, number in zip(before.documents, after.documents, before.numbers, strict=True):
        if [new_ids[token] for token in old.ids] != new.ids:
            return piece.where(number)
    return None
