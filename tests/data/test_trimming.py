"""Trimmed tokenizers: the texts that they are made for keep their tokens, every other text is still spelled."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compactlm_nemo.config.load import CONF
from compactlm_nemo.data.bundled import fetch_bundled
from compactlm_nemo.data.trimming import TrimmedVocabulary, kept_ids, trim_problem, trimmed
from compactlm_nemo.models import gguf

SYLLABLES = ["ka", "lo", "mi", "ré", "tan", "sur", "el", "ok", "日本", "3", "12", "--"]


def sentences(seed: int, count: int) -> list[str]:
    """Texts of words of one to four syllables, some of which occur often."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(300)]
    return [" ".join(rng.choices(words, weights=range(300), k=30)) for _ in range(count)]


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    """As SmolLM2's, or Llama 3's with `ignore_merges`: words are looked up whole before they are merged."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(sentences(0, 400), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Gemma's and Llama 2's: a text is one word, every way to a token is a merge, unknown letters become bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    trained.train_from_iterator(sentences(0, 400), trainers.BpeTrainer(vocab_size=1000, special_tokens=special))
    vocab = trained.get_vocab()
    by_rank = sorted(vocab, key=lambda token: vocab[token])
    ways = [
        (token[:cut], token[cut:])
        for token in by_rank
        if not token.startswith("<")
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, ways, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"])  # the last is no BPE token
    tokenizer.add_tokens([AddedToken("▁▁", normalized=True), AddedToken("<unused0>", normalized=False)])
    bos = ("<bos>", vocab["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(sentences(0, 400), trainer)
    return tokenizer


def word_level() -> Tokenizer:
    words = sorted({word for text in sentences(0, 100) for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level, "ignore_merges": lambda: byte_level(True), "byte_fallback": byte_fallback,
    "unigram": unigram, "word_level": word_level,
}  # fmt: skip


def trim(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], Tokenizer]:
    content = json.loads(tokenizer.to_str())
    kept = kept_ids(content, {number for text in texts for number in tokenizer.encode(text).ids})
    return kept, Tokenizer.from_str(json.dumps(trimmed(content, kept)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_keep_their_tokens_and_the_ids_their_order(kind: str) -> None:
    whole = KINDS[kind]()
    for seed in range(1, 5):
        texts = [text[:80] for text in sentences(0, 400)[seed * 3 : seed * 5]]
        texts += ["  ", "lo  mi   ka Ü"] * (kind != "word_level")
        kept, small = trim(whole, texts)
        assert len(kept) < 0.8 * whole.get_vocab_size() and kept == sorted(set(kept))
        assert small.get_vocab_size() == len(kept)
        for text in texts:
            before, after = whole.encode(text), small.encode(text)
            assert after.tokens == before.tokens
            assert [kept[number] for number in after.ids] == before.ids
        assert [small.id_to_token(i) for i in range(len(kept))] == [whole.id_to_token(number) for number in kept]


def test_an_unknown_letter_of_a_unigram_costs_what_it_did() -> None:
    """It costs 10 more than the worst piece; at less, `abcdefg` and an unknown `h` would beat the four pairs."""
    pairs = [(pair, -6.5) for pair in ("ab", "cd", "ef", "gh")]
    whole = Tokenizer(models.Unigram([("<unk>", 0.0), *pairs, ("abcdefg", -0.5), ("h", -40.0), ("z", -9.0)], unk_id=0))
    _, small = trim(whole, ["abcdefgh", "abcdefg"])
    assert small.encode("abcdefgh").tokens == whole.encode("abcdefgh").tokens == ["ab", "cd", "ef", "gh"]
    assert small.token_to_id("h") is not None and small.token_to_id("z") is None


@pytest.mark.parametrize("kind", ["byte_level", "ignore_merges", "byte_fallback"])
def test_any_other_text_is_still_spelled(kind: str) -> None:
    whole = KINDS[kind]()
    _, small = trim(whole, sentences(0, 400)[:3])
    for text in [*sentences(9, 20), "Ünd naïve \U0001f600 жизнь\n\ttabs"]:
        assert small.decode(small.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bpe_keeps_the_tokens_on_the_way_beside_those_of_the_texts(kind: str) -> None:
    whole = KINDS[kind]()
    texts = sentences(0, 400)[:20]
    used = {number for text in texts for number in whole.encode(text).ids}
    kept, _ = trim(whole, texts)
    single = {number for token, number in whole.get_vocab().items() if len(token) == 1 or token.startswith("<")}
    assert len(set(kept) - used - single) > 5


def test_special_tokens_stay_and_others_that_were_added_go_unless_used() -> None:
    whole = byte_fallback()
    content = json.loads(whole.to_str())
    names = [whole.id_to_token(number) for number in kept_ids(content, [], "a turn<unused0>")]
    plain = {name for name in names if not name.startswith("<0x")}
    assert plain == {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<unused0>"} and len(names) == 6 + 256
    _, small = trim(whole, ["ka  lo"])
    assert "▁▁" in small.encode("ka  lo").tokens and small.token_to_id("<unused0>") is None
    assert small.encode("ka").tokens[0] == "<bos>" and small.encode("ka").ids[0] == small.token_to_id("<bos>")


def test_ids_outside_of_the_vocabulary_follow() -> None:
    whole = byte_level()
    padding = whole.token_to_id("Ġkalo") or whole.get_vocab_size() - 1
    whole.post_processor = processors.RobertaProcessing(("<|begin|>", 1), ("<|endoftext|>", 0))
    whole.enable_padding(pad_id=padding, pad_token=whole.id_to_token(padding))
    content = json.loads(whole.to_str())
    kept = kept_ids(content, [])
    result = trimmed(content, kept)
    assert padding in kept and len(kept) < 300
    assert kept[result["padding"]["pad_id"]] == padding != result["padding"]["pad_id"]
    assert result["post_processor"]["sep"] == ["<|begin|>", 1] and result["post_processor"]["cls"][1] == 0
    assert content == json.loads(whole.to_str())  # its input is left as it was


def test_tokens_without_a_row_come_last_and_have_no_new_id() -> None:
    vocabulary = TrimmedVocabulary(ids=[0, 3, 7, 10, 11], whole_size=10)
    assert vocabulary.rows == [0, 3, 7] and vocabulary.new_ids == {0: 0, 3: 1, 7: 2}


def test_what_cannot_be_trimmed_is_named(tmp_path: Path) -> None:
    assert "needs a tokenizer.json" in str(trim_problem(tmp_path))

    def problem(model: Any) -> str | None:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        return trim_problem(tmp_path)

    assert problem({"type": "BPE", "dropout": None, "end_of_word_suffix": ""}) is None
    assert "a WordPiece model" in str(problem({"type": "WordPiece"}))
    assert "a model with end_of_word_suffix" in str(problem({"type": "BPE", "end_of_word_suffix": "</w>"}))
    assert "is damaged" in str(problem(None))


@pytest.mark.slow
def test_the_bundled_tokenizer_splits_its_texts_as_before(tmp_path: Path) -> None:
    assets = CONF.parent / "runs" / "assets"
    fetch_bundled(assets)
    gguf.convert(assets / "teacher.gguf", tmp_path)
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lines = (assets / "wiki" / "heldout.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:40]]
    kept, small = trim(whole, texts)
    assert 1000 < len(kept) < 6000 < whole.get_vocab_size()
    assert all(small.encode(text).tokens == whole.encode(text).tokens for text in texts)
    other = json.loads(lines[50])["text"]
    assert small.decode(small.encode(other).ids) == other and small.encode(other).tokens != whole.encode(other).tokens
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= small.get_vocab().keys()
