"""Chats become the tokens of their template and a mask of the answers, whoever wrote the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compactlm_nemo.data import chat
from compactlm_nemo.data.answer_mask import AnswerMask
from compactlm_nemo.data.chat import ChatEncoder
from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.data.tokens import tokenize_corpus
from compactlm_nemo.data.windows import Corpus, LossOn, TokenStream, Windows
from compactlm_nemo.errors import DataError

END = "<|endoftext|>"
CHATML = (
    "{% if tools %}<|start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WITH_BLOCKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LAST_THOUGHT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}hm {% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer_of(template: str | None) -> Any:
    """A token a character, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", END]})
    tokenizer.chat_template = template
    return tokenizer


def said(record: dict[str, Any], template: str | None = CHATML) -> tuple[str, str]:
    """The whole text, and that of the tokens that count, each run of them in brackets."""
    tokenizer = tokenizer_of(template)
    encoded = ChatEncoder(tokenizer, tokenizer.convert_tokens_to_ids(END)).encode(record)
    assert encoded.mask is not None and len(encoded.mask) == len(encoded.ids)
    counted, before = "", False
    for token, counts in zip(encoded.ids, encoded.mask, strict=True):
        counted += ("]" if before and not counts else "") + ("[" if counts and not before else "")
        counted += tokenizer.decode([token]) if counts else ""
        before = counts
    return tokenizer.decode(encoded.ids), counted + ("]" if before else "")


def turns(*pairs: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), pair.split(":"), strict=True)) for pair in pairs]


CHAT = {"messages": turns("system:Be kind.", "user:Hi", "assistant:Hello you", "user:Bye", "assistant:See you")}
WHOLE = (
    "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\nHello you<|end|>\n"
    "<|start|>user\nBye<|end|>\n<|start|>assistant\nSee you<|end|>\n<|endoftext|>"
)


@pytest.mark.parametrize("template", [CHATML, WITH_BLOCKS])
def test_what_the_assistant_says_and_the_token_that_ends_it_count(template: str) -> None:
    assert said(CHAT, template) == (WHOLE, "[Hello you<|end|>][See you<|end|>]")


def test_roles_may_come_in_any_order_and_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    messages = turns("user:When?", "assistant:clock", "tool:12", "assistant:Noon", "assistant:or so", "user:Ah")
    for given in (tools, json.dumps(tools)):
        text, counted = said({"messages": messages, "tools": given})
        assert text.startswith("<|start|>tools\nclock <|end|>\n<|start|>user\nWhen?")
        assert counted == "[clock<|end|>][Noon<|end|>][or so<|end|>]"


def test_a_completion_and_the_end_of_its_document_count() -> None:
    record = {"prompt": "2 + 2 = ", "completion": "4."}
    assert said(record, None) == ("2 + 2 = 4.<|endoftext|>", "[4.<|endoftext|>]")


@pytest.mark.parametrize("template", [CHATML, WITH_BLOCKS])
def test_of_a_prompt_and_a_completion_of_messages_the_completion_counts(template: str) -> None:
    record = {"prompt": CHAT["messages"][:4], "completion": CHAT["messages"][4:]}
    assert said(record, template) == (WHOLE, "[See you<|end|>]")


def test_a_template_without_an_end_token_counts_the_blank_that_ends_an_answer() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert said({"messages": turns("user:Hi", "assistant:Yo", "user:Bye")}, template)[1] == "[Yo\n\n]"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LAST_THOUGHT, "has an answer, message 2, that the chat template renders in another way when the chat goes on"),
        (None, "the tokenizer has no chat template; give one in data.chat_template=FILE"),
        ("{{ raise_exception('Roles must alternate') }}", r"cannot be rendered by the chat template \(Roles must"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot be rendered by the chat template .*unsafe"),
        ("{{ messages.append(1) }}", "cannot be rendered by the chat template .*unsafe"),
        ("{% for %}", "cannot be rendered by the chat template"),
        (ENDLESS, r"keeps the chat template busy for more than 0\.3 s"),
        ("{{ 'a' * 10**11 }}", "takes more than 1 GiB in the chat template"),
        ("{{ 'a' * 1001 }}", "becomes 1,001 characters by the chat template, more than 1,000"),
    ],
)
def test_what_a_template_cannot_do_is_one_line(
    template: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    monkeypatch.setattr(chat, "CHARACTERS", 1000)
    with pytest.raises(DataError, match=words) as caught:
        said(CHAT, template)
    assert "\n" not in str(caught.value)
    assert said(CHAT)[0] == WHOLE  # time and memory are as before


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": []}, "has no `messages`; it must be a list of messages"),
        ({"messages": ["Hi"]}, "has a message 0 in `messages` without a `role`"),
        ({"messages": [{"role": "user"}]}, "has a message 0 in `messages` without `content`"),
        ({"messages": turns("user:Hi"), "tools": "{"}, "has `tools` that are no JSON"),
        ({"messages": turns("user:Hi"), "tools": {}}, "has `tools` that are no list"),
        ({"prompt": "Hi"}, "has a `prompt` without a `completion`"),
        ({"prompt": "Hi", "completion": ""}, "has a `prompt` without a `completion`"),
        ({"prompt": turns("user:Hi"), "completion": "Yo"}, "has no `completion`; it must be a list of messages"),
    ],
)
def test_a_record_that_is_no_chat_is_told(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        said(record)


BLEND = [{"text": "plain"}, CHAT, {"prompt": "a", "completion": "b"}, {"text": "more"}]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_texts_chats_and_completions_of_one_file_have_one_mask(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHATML)
    end = tokenizer.convert_tokens_to_ids(END)
    counts = tokenize_corpus(
        write(tmp_path / "c.jsonl", BLEND), tmp_path / "c", DocumentEncoder(tokenizer=tokenizer, eod=end)
    )
    encoder, wanted = ChatEncoder(tokenizer, end), [True] * 6
    for record in BLEND[1:3]:
        wanted += encoder.encode(record).mask or []
    wanted += [True] * 5
    assert counts[:2] == (len(wanted), sum(wanted))
    mask = AnswerMask(tmp_path / "c", len(wanted))
    for start in range(0, len(wanted), 7):
        for stop in range(start, len(wanted), 5):
            assert mask.counts(start, stop).tolist() == wanted[start:stop]
    with pytest.raises(DataError, match=r"c\.mask has \d+ bytes, not one bit for each of 9 tokens"):
        AnswerMask(tmp_path / "c", 9)
    tokenize_corpus(
        write(tmp_path / "p.jsonl", BLEND[:1]), tmp_path / "p", DocumentEncoder(tokenizer=tokenizer, eod=end)
    )
    assert not (tmp_path / "p.mask").exists()


@pytest.mark.parametrize("length", [4, 11])
def test_windows_mark_what_does_not_count_and_pass_over_what_has_no_answer(tmp_path: Path, length: int) -> None:
    tokenizer = tokenizer_of(CHATML)
    end = tokenizer.convert_tokens_to_ids(END)
    tokenize_corpus(
        write(tmp_path / "c.jsonl", [CHAT, *BLEND]), tmp_path / "c", DocumentEncoder(tokenizer=tokenizer, eod=end)
    )
    every = TokenStream(tmp_path / "c", loss=LossOn.all)
    tokens = every.window(0, every.num_tokens - 1).tolist()
    flags = AnswerMask(tmp_path / "c", len(tokens)).counts(0, len(tokens)).tolist()
    wanted = []
    for start in range(0, len(tokens) - length, length):
        if any(flags[start + 1 : start + length + 1]):
            # Place s predicts token s + 1.
            marked = [tokens[i] if flags[i + 1] else ~tokens[i] for i in range(start, start + length)]
            wanted.append([*marked, tokens[start + length]])
    stream = TokenStream(tmp_path / "c")
    assert 0 < len(wanted) < every.num_windows(length) and stream.num_windows(length) == len(wanted)
    assert [stream.window(idx, length).tolist() for idx in range(len(wanted))] == wanted
    windows = Windows([Corpus(tmp_path / "c", 1.0)], length, seed=1)
    assert sorted(windows.sample(i).tolist() for i in range(len(wanted))) == sorted(wanted)
    whole = Windows([Corpus(tmp_path / "c", 1.0, LossOn.all)], length, seed=1)
    assert windows.is_marked and not whole.is_marked and min(whole.sample(0)) >= 0


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"text": "a"}, {"messages": turns("user:Hi"), "text": "a"}], r"c\.jsonl:2 has two of `text`, `messages`"),
        ([{"messages": turns("user:Hi")}], r"c\.jsonl holds no answer; a chat needs messages of the role assistant"),
        ([{"text": "a"}, {"messages": [1]}], r"c\.jsonl:2 has a message 0 in `messages` without a `role`"),
        ([{"messages": turns(f"user:{END}", "assistant:a")}], r"c\.jsonl:1 holds the end-of-text token \d+ within"),
    ],
)
def test_a_file_of_chats_that_cannot_serve_is_told_by_its_line(tmp_path: Path, records: Any, words: str) -> None:
    tokenizer = tokenizer_of(CHATML)
    path = write(tmp_path / "c.jsonl", records)
    with pytest.raises(DataError, match=words):
        tokenize_corpus(
            path,
            tmp_path / "c",
            DocumentEncoder(tokenizer=tokenizer, eod=tokenizer.convert_tokens_to_ids(END), keeps_apart=True),
        )
    assert [each.name for each in tmp_path.iterdir()] == ["c.jsonl"]
