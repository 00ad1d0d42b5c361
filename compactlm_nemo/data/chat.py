"""Chats and prompts with completions become tokens, and a mask of those that the model is to learn to answer.

`messages` are rendered by the tokenizer's own chat template, or by a file of the user's. Answers are what the assistant
says: what the template wraps into ``{% generation %}``; without that, what its rendering of the chat up to an answer
has more than the rendering before it, with the prompt for an answer. A template is data of whoever made the model: it
runs in transformers' sandbox, for at most `SECONDS` a rendering and within `MEMORY_BYTES`.
"""

from __future__ import annotations

import json
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from compactlm_nemo.errors import DataError

SECONDS = 10.0
"""Longest time that a template may take for one chat."""
MEMORY_BYTES = 2**30
"""What the process may take more while a template runs."""
CHARACTERS = 2**26
"""Most characters of a rendered chat."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: list[int]
    mask: list[bool] | None
    """Which tokens the model learns to predict; None for all."""


class ChatEncoder:
    """Turns records with `messages`, or with `prompt` and `completion`, into tokens and masks.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        template: Jinja text that takes the place of the tokenizer's chat template.
        eod: Token that ends every document. It counts behind a completion, which nothing else ends.
    """

    def __init__(self, tokenizer: Any, eod: int, template: str | None = None) -> None:
        self.tokenizer, self.eod, self.own_template = tokenizer, eod, template

    def encode(self, record: dict[str, Any]) -> Encoded:
        """Return the tokens of a record and which of them answer.

        Raises:
            DataError: the record is no chat, or the template cannot render it; without the place of the record.
        """
        if "messages" in record:
            return self._chat(messages_of(record, "messages"), 0, tools_of(record))
        prompt, completion = record["prompt"], record.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str) and completion:
            ids, mask = self._masked(prompt + completion, [(len(prompt), len(prompt) + len(completion))])
            return Encoded([*ids, self.eod], [*mask, True])
        if isinstance(prompt, list):
            before = messages_of(record, "prompt")
            return self._chat(before + messages_of(record, "completion"), len(before), tools_of(record))
        raise DataError("has a `prompt` without a `completion`, both non-empty texts or both lists of messages")

    @cached_property
    def template(self) -> str:
        """The Jinja text that renders chats."""
        template = self.own_template or self.tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError("is a chat, and the tokenizer has no chat template; give one in data.chat_template=FILE")
        return template

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        return tuple(token for token in self.tokenizer.all_special_tokens if token)

    def _chat(self, messages: list[dict[str, Any]], first: int, tools: list[Any] | None) -> Encoded:
        """Return a chat of which the assistant's messages from number `first` on count."""
        with _errors_told():
            if first == 0 and _GENERATION.search(self.template):
                ids, mask = self._by_generation_blocks(messages, tools)
            else:
                ids, mask = self._masked(*self._by_prefixes(messages, first, tools))
        return Encoded([*ids, self.eod], [*mask, False])

    def _by_generation_blocks(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[list[int], list[bool]]:
        """Let transformers tell which tokens the template wraps into ``{% generation %}``."""
        with _limited():
            encoded = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
        return encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]

    def _by_prefixes(
        self, messages: list[dict[str, Any]], first: int, tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered chat, and from where to where the assistant speaks in it."""
        text, spans = self._rendered(messages, tools), []
        for idx, message in enumerate(messages):
            if message["role"] != "assistant" or idx < first:
                continue
            before = self._rendered(messages[:idx], tools, add_generation_prompt=True)
            until = self._rendered(messages[: idx + 1], tools)
            if not (until.startswith(before) and text.startswith(until)):
                raise DataError(
                    f"has an answer, message {idx}, that the chat template renders in another way when the chat goes "
                    "on, so where it stands is not known; give a template with {% generation %} in "
                    "data.chat_template=FILE"
                )
            spans.append((len(before), self._end(text, len(before), len(until))))
        return text, spans

    def _end(self, text: str, start: int, end: int) -> int:
        """Return where an answer ends: blanks between the token that ends it and the next message do not count."""
        spoken = text[start:end].rstrip()
        return start + len(spoken) if spoken.endswith(self.specials) else end

    def _rendered(self, messages: list[dict[str, Any]], tools: list[Any] | None, **flags: bool) -> str:
        with _limited():
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=False, **flags
            )
        if len(text) > CHARACTERS:
            raise DataError(f"becomes {len(text):,} characters by the chat template, more than {CHARACTERS:,}")
        return text

    def _masked(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokenise; a token counts where it begins within a span."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
        return encoded["input_ids"], mask


def messages_of(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the messages of a record, each with a role; content may be a text, parts, or nothing beside tool calls."""
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"has no `{key}`; it must be a list of messages")
    for idx, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"has a message {idx} in `{key}` without a `role`, such as user or assistant")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"has a message {idx} in `{key}` without `content`")
    return messages


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """Return the tools that the assistant may call, a list or its JSON text; None without any."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError("has `tools` that are no JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError("has `tools` that are no list")
    return tools or None


def read_template(path: Path | None) -> str | None:
    """Return the text of the user's template; None where there is none."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={path} cannot be read ({error}); give a Jinja file.") from None


class _TooLong(Exception):
    """A template has run for too long."""


@contextmanager
def _errors_told() -> Iterator[None]:
    """Turn what goes wrong in a template into one line."""
    from jinja2 import TemplateError

    try:
        yield
    except DataError:
        raise
    except _TooLong:
        raise DataError(f"keeps the chat template busy for more than {SECONDS:g} s") from None
    except (MemoryError, OverflowError):
        raise DataError(f"takes more than {MEMORY_BYTES / 2**30:g} GiB in the chat template") from None
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot be rendered by the chat template ({reason})") from None


@contextmanager
def _limited() -> Iterator[None]:
    """Bound the time of the main thread and the memory of this process while a template runs."""
    previous: Any = signal.signal(signal.SIGALRM, _too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


def _too_long(*_: object) -> None:
    raise _TooLong


def _address_space() -> int:
    """Return the bytes of addresses that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
