"""The tokenizer of a Hugging Face folder, which must split text as the model was trained with."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from compactlm_nemo.config.data import Bos
from compactlm_nemo.errors import CheckpointError, ConfigError

PROBE = (
    "It's 12345 and 678 o'clock;  they've said HELLO'S.\n\n\tdef f(x):  # x>=3.5e-4\n    return {'a': x[0]}\r\n"
    "https://a.b/c?d=e&f\u2026 \u00e9t\u00e9 na\u00efve Stra\u00dfe \u0436\u0438\u0437\u043d\u044c \u65e5\u672c\u8a9e "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600\n"
)
"""Text on whose parts the rules of known tokenizers differ: digits, contractions, space, line ends, scripts."""

_log = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> Any:
    """Load the Hugging Face tokenizer of a local folder; nothing is downloaded and no code of the folder runs.

    transformers 5 gives some classes (`GPT2Tokenizer`, `Qwen2Tokenizer`, `LlamaTokenizer`) rules of their own instead
    of those of the file, and so other ids than the model was trained with. Where the two differ on `PROBE`, the file is
    loaded without the class; where they still do, nothing is.

    Raises:
        CheckpointError: nothing there loads, or what loads does not split text as the file does.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a folder with tokenizer.json.")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = _load(AutoTokenizer, folder)
    kind = type(tokenizer).__name__
    text, ids, path = _by_file(folder)
    if path is None or tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
        return tokenizer
    tokenizer = _load(PreTrainedTokenizerFast, folder)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        raise CheckpointError(
            f"{folder}: transformers splits text otherwise than its {path.name}, with {kind} and without; add the "
            "tokenizer.json of the model's own publisher, or use another version of transformers."
        )
    _log.warning("%s: %s would split text otherwise than %s, so the file is used as it is.", folder, kind, path.name)
    return tokenizer


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} holds no tokenizer that loads ({reason}); add tokenizer.json.") from error


def _by_file(folder: Path) -> tuple[str, list[int], Path | None]:
    """Return a text, its ids by the file that defines the tokenizer, and that file; None where there is none."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path} is damaged ({reason}); fetch it again.") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return PROBE, tokenizer.encode(PROBE, add_special_tokens=False).ids, path
    path = folder / "tokenizer.model"
    if path.is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            return "", [], None  # of another kind, as tiktoken's
        text = " ".join(PROBE.split())  # what it makes of other space is not the same everywhere, and harmless
        return text, processor.encode(text), path
    return "", [], None


@cache
def end_of_text(folder: Path, chosen: str | None = None) -> int:
    """Return the token that ends a document, by the tokenizer in `folder`: the chosen one, `data.document_end`.

    Without a choice that is `<|endoftext|>` or `<|end_of_text|>`, which unlike the `eos_token` of a chat model end no
    turn of a chat; else the `eos_token`.
    """
    tokenizer = load_tokenizer(folder)
    if chosen is not None:
        if chosen not in tokenizer.get_vocab():
            raise ConfigError(f"data.document_end={chosen} is no token of the model's tokenizer; leave it out.")
        return int(tokenizer.convert_tokens_to_ids(chosen))
    for name in ("<|endoftext|>", "<|end_of_text|>"):
        end = tokenizer.convert_tokens_to_ids(name)
        if end is not None and (end != tokenizer.unk_token_id or end == tokenizer.eos_token_id):
            return int(end)
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("model.source: its tokenizer has no end-of-text token; set eos_token in its config.")
    return int(end)


@cache
def window_start(folder: Path, bos: Bos) -> int | None:
    """Return the token that begins every window, None without one, by the tokenizer in `folder`.

    Raises:
        ConfigError: `data.bos=always`, and the tokenizer has none.
    """
    if bos is Bos.never:
        return None
    tokenizer = load_tokenizer(folder)
    number: int | None = tokenizer.bos_token_id
    if bos is Bos.always and number is None:
        raise ConfigError("data.bos=always needs a bos_token, which the tokenizer has not; set data.bos=never.")
    puts_it = bos is Bos.always or tokenizer("a")["input_ids"][:1] == [number]
    return number if puts_it else None


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuse the tokenizer of another model, with more entries than the model has rows.

    Tokens that were added to the tokenizer alone (`[PAD]`, mostly) are named once: ids are checked one by one anyway.

    Raises:
        ConfigError: an entry that was not added has no row.
    """
    if len(tokenizer) <= vocab_size:
        return
    added = {number for number in tokenizer.added_tokens_decoder if number >= vocab_size}
    if len(tokenizer) - len(added) > vocab_size:
        raise ConfigError(
            f"model.source: vocab_size={vocab_size} is smaller than its tokenizer's {len(tokenizer)}; give its own."
        )
    names = ", ".join(str(tokenizer.added_tokens_decoder[number]) for number in sorted(added))
    _log.warning("model.source: no embedding for %s of its tokenizer; a text with them is refused.", names)
