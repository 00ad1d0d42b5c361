"""What documents become that are not as one would like them: each case of a kind is counted, and said."""

import gzip
import json
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compactlm_nemo.config.data import Bos, DataConfig
from compactlm_nemo.data import records
from compactlm_nemo.data.documents import EMPTY, HALF_CHARACTERS, INNER_ENDS, SPECIAL_TOKENS, DocumentEncoder
from compactlm_nemo.data.tokenizer import end_of_text, window_start
from compactlm_nemo.data.tokens import tokenize_corpus
from compactlm_nemo.data.windows import Corpus, TokenStream, Windows
from compactlm_nemo.errors import ConfigError, DataError
from tests.support.ranks import run_ranks

WORDS = ["<unk>", "one", "two", "three", "\ufffd", "<", "|", "eot_id", "|>", "<|"]
BEGIN, EOT, END = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"


def tokenizer_of(*, puts_begin: bool = False, eos: str = EOT) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token=BEGIN, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [END, EOT]})
    if puts_begin:
        begin = tokenizer.convert_tokens_to_ids(BEGIN)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
        )
    return tokenizer


def write(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(prefix) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[idx].tolist() for idx in range(len(dataset))]


def test_an_empty_document_is_skipped_counted_and_said_and_refused_only_where_all_are(tmp_path, caplog):
    path, encoder = write(tmp_path / "c.jsonl", ["one", "", None, " \n", "two"]), None
    encoder = DocumentEncoder(tokenizer=tokenizer_of(), eod=0)
    counts = tokenize_corpus(path, tmp_path / "c", encoder)
    assert documents(tmp_path / "c") == [[1, 0], [2, 0]]
    assert (counts.documents, counts.troubles) == (2, {EMPTY: 3})
    assert "3 of 2 documents" not in caplog.text and f"{path}: 3 records empty, skipped" in caplog.text
    with pytest.raises(DataError, match="holds no document"):
        tokenize_corpus(write(tmp_path / "e.jsonl", ["", None]), tmp_path / "e", encoder)


def test_half_an_emoji_is_replaced_and_counted_and_a_whole_one_is_not(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one \\ud83d two"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\ude00"}\n')
    counts = tokenize_corpus(path, tmp_path / "c", DocumentEncoder(tokenizer=tokenizer_of(), eod=9))
    assert documents(tmp_path / "c") == [[1, 4, 2, 9], [0, 9], [4, 9]]
    assert counts.troubles == {HALF_CHARACTERS: 2}


@pytest.mark.parametrize("parses", [False, True])
def test_special_tokens_written_in_a_text_are_letters_or_tokens_and_counted(tmp_path, caplog, parses):
    tokenizer = tokenizer_of()
    path = write(tmp_path / "c.jsonl", ["one", f"two {EOT} three", "one"])
    end = tokenizer.convert_tokens_to_ids(END)
    encoder = DocumentEncoder(tokenizer=tokenizer, eod=end, parses_special_tokens=parses)
    counts = tokenize_corpus(path, tmp_path / "c", encoder)
    inner = [tokenizer.convert_tokens_to_ids(EOT)] if parses else [9, 7, 8]
    assert documents(tmp_path / "c") == [[1, end], [2, *inner, 3, end], [1, end]]
    assert counts.troubles == {SPECIAL_TOKENS: 1}
    assert "1 of 3 documents that spell special tokens" in caplog.text and "data.special_tokens=parse" in caplog.text


def test_the_end_of_documents_is_a_setting_and_a_warning_tells_where_it_ends_turns_too(tmp_path, caplog):
    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(tmp_path / "tok")
    assert end_of_text(tmp_path / "tok") == tokenizer.convert_tokens_to_ids(END), "a chat model's eos ends turns"
    eot = end_of_text(tmp_path / "tok", EOT)
    assert eot == tokenizer.convert_tokens_to_ids(EOT)
    with pytest.raises(ConfigError, match=r"data.document_end=<none> is no token of the model's tokenizer"):
        end_of_text(tmp_path / "tok", "<none>")
    path = write(tmp_path / "c.jsonl", [f"two {EOT} three"])
    encoder = DocumentEncoder(tokenizer=tokenizer, eod=eot, parses_special_tokens=True)
    assert tokenize_corpus(path, tmp_path / "c", encoder).troubles == {INNER_ENDS: 1, SPECIAL_TOKENS: 1}
    assert f"token {eot} also ends parts of documents; set data.document_end" in caplog.text


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path):
    for puts_begin in (False, True):
        tokenizer_of(puts_begin=puts_begin).save_pretrained(tmp_path / str(puts_begin))
    begin = tokenizer_of().convert_tokens_to_ids(BEGIN)
    found = {p: [window_start(tmp_path / str(p), bos) for bos in Bos] for p in (False, True)}
    assert list(Bos) == [Bos.tokenizer, Bos.always, Bos.never]
    assert found == {False: [None, begin, None], True: [begin, begin, None]}
    write(tmp_path / "c.jsonl", ["one two three"] * 9)
    tokenize_corpus(tmp_path / "c.jsonl", tmp_path / "c", DocumentEncoder(tokenizer=tokenizer_of(), eod=0))
    plain, begun = TokenStream(tmp_path / "c"), TokenStream(tmp_path / "c", bos=begin)
    for idx in range(plain.num_windows(5)):
        assert begun.window(idx, 5).tolist() == [begin, *plain.window(idx, 5).tolist()[1:]]
    assert Windows([Corpus(tmp_path / "c", 1.0, bos=begin)], 5, seed=1).sample(3)[0] == begin


def test_megatron_files_are_named_with_and_without_suffix(tmp_path):
    write(tmp_path / "c.jsonl", ["one"])
    tokenize_corpus(tmp_path / "c.jsonl", tmp_path / "c.v1", DocumentEncoder(tokenizer=tokenizer_of(), eod=0))
    for suffix in ("", ".bin", ".idx"):
        corpus = DataConfig(train={"a": f"{tmp_path}/c.v1{suffix}"}).train["a"]
        assert corpus.is_tokenised and corpus.prefix == tmp_path / "c.v1"
    assert not DataConfig(train={"a": f"{tmp_path}/c.jsonl"}).train["a"].is_tokenised
    assert not DataConfig(train={"a": [f"{tmp_path}/c.v1"]}).train["a"].is_tokenised


def test_lists_and_keys_are_settings():
    corpus = DataConfig(train={"a": ["x.jsonl", "y"], "b": {"path": "z", "key": "body"}}).train
    assert (corpus["a"].paths, corpus["a"].key, corpus["b"].paths, corpus["b"].key) == (
        ["x.jsonl", "y"],
        "text",
        ["z"],
        "body",
    )
    for wrong in ([], [3], {"path": ["a", None]}, {"path": "a", "key": ""}, {"path": "a", "key": 3}, 3.5, None):
        with pytest.raises(ConfigError, match=r"data.train.a"):
            DataConfig(train={"a": wrong})


def _tokenize(rank: int, world: int, folder: Path) -> None:
    records.PIECE_RECORDS = 3
    encoder = DocumentEncoder(tokenizer=tokenizer_of(), eod=0)
    for name in ("one.jsonl.gz", "shards"):
        counts = tokenize_corpus(
            folder / name, folder / f"{world}/{name}", encoder, parts=folder / f"{world}/parts", keeps_digests=True
        )
        if rank == 0:
            content = [counts.tokens, counts.documents, counts.troubles, sorted(counts.digests.values())]
            (folder / f"{world}/{name}.json").write_text(json.dumps(content))
        for part in (folder / f"{world}").glob("*parts*") if rank == 0 else ():
            part.unlink()


def test_any_number_of_ranks_gives_the_same_bytes(tmp_path):
    rng = numpy.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "three", ""], size=rng.integers(0, 6))) for _ in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "shards").mkdir()
    for idx in range(5):
        (tmp_path / f"shards/{idx}.jsonl").write_text("".join(lines[8 * idx : 8 * idx + 8]))
    for world in (1, 2, 3):
        (tmp_path / str(world)).mkdir()
        run_ranks(_tokenize, world, tmp_path, tmp_path)
    for name in ("one.jsonl.gz", "shards"):
        want = [[WORDS.index(word) for word in text.split()] + [0] for text in texts if text.strip()]
        assert documents(tmp_path / f"1/{name}") == want
        for end in (".bin", ".idx", ".json"):
            first = (tmp_path / f"1/{name}{end}").read_bytes()
            assert [(tmp_path / f"{world}/{name}{end}").read_bytes() for world in (2, 3)] == [first, first]


def test_parts_of_an_unfinished_text_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE_RECORDS", 2)
    path = write(tmp_path / "c.jsonl", ["one", "two", "three", "one", "two"])
    tokenizer = tokenizer_of()
    whole = tokenize_corpus(path, tmp_path / "whole", DocumentEncoder(tokenizer=tokenizer, eod=0))
    encoder, calls = DocumentEncoder(tokenizer=tokenizer, eod=0), []

    def dies_at_the_second(piece, real=DocumentEncoder.encode):
        calls.append(piece.place)
        if len(calls) == 2:
            raise OSError("the machine is gone")
        return real(encoder, piece)

    monkeypatch.setattr(encoder, "encode", dies_at_the_second)
    with pytest.raises(OSError, match="gone"):
        tokenize_corpus(path, tmp_path / "c", encoder, parts=tmp_path / "parts/p")
    assert not (tmp_path / "c.bin").exists()
    assert tokenize_corpus(path, tmp_path / "c", encoder, parts=tmp_path / "parts/p") == whole
    assert calls == [(0, 0), (0, 1), (0, 1), (0, 2)], "the first piece is not tokenised again"
    for end in (".bin", ".idx"):
        assert (tmp_path / f"c{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()


def test_a_text_of_the_held_out_ones_is_refused_with_both_places(tmp_path):
    heldout, train = write(tmp_path / "h.jsonl", ["one", "two "]), write(tmp_path / "t.jsonl", ["three", "\ntwo"])
    tokenizer = tokenizer_of()
    kept = tokenize_corpus(heldout, tmp_path / "h", DocumentEncoder(tokenizer=tokenizer, eod=0), keeps_digests=True)
    with pytest.raises(DataError, match=rf"{train}:2 and {heldout}:2 hold the same document"):
        tokenize_corpus(train, tmp_path / "t", DocumentEncoder(tokenizer=tokenizer, eod=0, refused=kept.digests))
