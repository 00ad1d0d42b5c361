"""Tokenizers as they lie in folders: the ids are those that the model was trained with, or one line says why not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from compactlm_nemo.data.tokenizer import PROBE, check_vocabulary, load_tokenizer
from compactlm_nemo.errors import CheckpointError, ConfigError

TEXT = "It's 12345 and 678\n\n  They've said HELLO'S at http://x.y/z?a=1, \u00e9t\u00e9 \u65e5\u672c\u8a9e"
WORDS = "the model 7 was cut, and taught 12 times again"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in cl100k: three digits at most, contractions in any case; GPT-2 and Qwen split otherwise."""


@pytest.fixture(scope="module")
def cl100k_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def folder_of(tokenizer: Tokenizer, folder: Path, kind: str, model_type: str | None, **more: str) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | end | more))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_class_with_rules_of_its_own_gives_the_ids_of_tokenizer_json(tmp_path, cl100k_like, kind, model_type):
    """transformers gives `Qwen2Tokenizer` 32 tokens of this text where the file, and the model's training, have 27."""
    tokenizer = load_tokenizer(folder_of(cl100k_like, tmp_path / "model", kind, model_type))
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == cl100k_like.encode(TEXT).ids
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0 == tokenizer.eos_token_id


def test_the_chosen_file_is_told(tmp_path, cl100k_like, caplog):
    folder = folder_of(cl100k_like, tmp_path / "model", "Qwen2Tokenizer", "qwen2", chat_template="{{ messages }}")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert "Qwen2Tokenizer would split text otherwise than tokenizer.json, so the file is used" in caplog.text
    assert tokenizer.chat_template == "{{ messages }}", "what stands beside the file still counts"


def test_a_tokenizer_that_never_follows_its_file_is_refused(tmp_path, cl100k_like, monkeypatch):
    folder = folder_of(cl100k_like, tmp_path / "model", "Qwen2Tokenizer", "qwen2")
    kind = type(transformers.AutoTokenizer.from_pretrained(str(folder)))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", kind)
    with pytest.raises(CheckpointError, match="splits text otherwise than its tokenizer.json, with Qwen2Tokenizer and"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_json_is_one_line(tmp_path, cl100k_like):
    folder = folder_of(cl100k_like, tmp_path / "model", "PreTrainedTokenizerFast", "llama")
    (folder / "tokenizer.json").write_text('{"model": 3')
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def sentencepiece_folder(folder: Path, kind: str, more: dict[str, object], config: dict[str, str]) -> Path:
    import sentencepiece

    folder.mkdir()
    texts = folder.parent / "texts.txt"
    lines = [" ".join(PROBE.split())] * 5 + [f"the model {number} was cut and taught again" for number in range(300)]
    texts.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=380,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, **more,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


OF_LLAMA: dict[str, object] = {
    "normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("more", [OF_LLAMA, {}], ids=["as_llama", "plain"])
@pytest.mark.parametrize("config", [{"tokenizer_class": "LlamaTokenizer"}, {}], ids=["class", "no_class"])
def test_a_folder_with_tokenizer_model_alone_gives_its_ids_or_is_refused(tmp_path, kind, more, config):
    """Which of these transformers converts rightly depends on its version; none may come out with other ids."""
    import sentencepiece

    folder = sentencepiece_folder(tmp_path / "model", kind, more, config)
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(WORDS)
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and "otherwise than its tokenizer.model" in str(error)
        is_as_llama_2 = kind == "bpe" and more is OF_LLAMA and config
        assert Version(transformers.__version__) < Version("5.20") or not is_as_llama_2
    else:
        assert tokenizer(WORDS, add_special_tokens=False)["input_ids"] == wanted


def test_a_pad_token_that_was_added_to_the_tokenizer_alone_is_told(tmp_path, cl100k_like, caplog):
    tokenizer = load_tokenizer(folder_of(cl100k_like, tmp_path / "model", "PreTrainedTokenizerFast", "llama"))
    rows = len(tokenizer)
    check_vocabulary(tokenizer, rows)
    assert not caplog.text
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tokenizer, rows)
    assert "no embedding for [PAD] of its tokenizer" in caplog.text
    with pytest.raises(ConfigError, match=rf"vocab_size={rows - 2} is smaller than its tokenizer's {rows + 1}"):
        check_vocabulary(tokenizer, rows - 2)
