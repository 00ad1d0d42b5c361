"""Records of stored targets: what comes back, how much it weighs, and what is said of damage."""

from __future__ import annotations

import json
import lzma
import math
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compactlm_nemo.distill.stored_targets import (
    METADATA,
    StoredTargets,
    TopKRecord,
    counted_record,
    decode_hidden,
    decode_top_k,
    encode_hidden,
    encode_top_k,
    num_shards,
    shard_path,
    split_record,
    spread,
    write_shard,
)
from compactlm_nemo.errors import DataError

VOCAB, TOKENS, K = 70_000, 50, 64  # ids of more than two bytes


def log_probs() -> Tensor:
    """`[T, V]` of a peaked random softmax, one row of which is sure of its token."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=rng, dtype=torch.float64)
    logits[0, 7] += 400
    return torch.log_softmax(logits, dim=-1)


def record_of(log_p_TV: Tensor, k: int) -> TopKRecord:
    found = log_p_TV.topk(k, dim=-1)
    rest_T = log_p_TV.exp().scatter(-1, found.indices, 0).sum(-1)
    return TopKRecord(
        found.indices, found.values.exp().float(), rest_T.float(), torch.linspace(0, 12, len(log_p_TV))
    )  # fmt: skip


def test_top_k_comes_back() -> None:
    log_p_TV = log_probs()
    record = record_of(log_p_TV, K)
    data = encode_top_k(record)
    got = decode_top_k(data, TOKENS, K)
    assert got.ids_TK.equal(record.ids_TK.sort(-1).values)
    # Each is off by half a step at most, up to a scale that a row has in common.
    wanted = log_p_TV.gather(-1, got.ids_TK)[1:]
    off, half = got.probs_TK[1:].double().log() - wanted, step(wanted) / 2
    assert ((off - off[:, :1]).abs() <= half + half[:, :1] + 1e-4).all()
    assert_close(got.probs_TK.sum(-1) + got.rest_T, torch.ones(TOKENS), rtol=0, atol=1e-6)
    assert_close(got.rest_T[1:], record.rest_T[1:], rtol=1 / 63, atol=0)  # half of 1/32 nat
    assert_close(got.ce_T, record.ce_T, rtol=0, atol=1 / 63)
    assert got.probs_TK[0, got.ids_TK[0] == 7] == 1
    # Ids drawn from all of the vocabulary weigh log2(70000 choose 64) bits, 93 bytes, probabilities some 3 bits each.
    assert len(data) < 125 * TOKENS


def test_a_record_of_some_tokens_comes_back_at_their_places() -> None:
    counts_T = torch.tensor([False, True, False, False, True, True, False, False, True, False])
    hidden_TG = torch.arange(30.0).view(10, 3)
    data = counted_record(counts_T, encode_hidden(hidden_TG[counts_T]))
    got_T, record = split_record(data, 10)
    assert got_T.equal(counts_T)
    places = [1, 1, 1, 1, 4, 5, 5, 5, 8, 8]  # the others repeat a token that counts
    assert spread(decode_hidden(record, 4, 3, torch.float32), got_T).equal(hidden_TG[places])


def step(log_p: Tensor) -> Tensor:
    """Nats between neighbouring levels, at their upper one."""
    return (0.05 * (-log_p / 2).exp()).clamp(0.125, 2.0)


def test_rounding_costs_what_the_step_says() -> None:
    """KL between the true and the stored distribution over k + 1 outcomes."""
    log_p_TV = log_probs()[1:]
    got = decode_top_k(encode_top_k(record_of(log_p_TV, K)), TOKENS - 1, K)
    p_TK = log_p_TV.gather(-1, got.ids_TK).exp()
    rest_T = 1 - p_TK.sum(-1)
    kl_T = (p_TK * (p_TK / got.probs_TK).log()).sum(-1) + rest_T * (rest_T / got.rest_T).log()
    expected = (p_TK * step(p_TK.log()) ** 2 / 24).sum(-1).mean()
    assert expected / 3 < kl_T.mean() < 1.5 * expected


def test_all_of_a_vocabulary_leaves_no_rest() -> None:
    log_p_TV = torch.log_softmax(torch.randn(5, 30, generator=torch.Generator().manual_seed(1)).double(), -1)
    got = decode_top_k(encode_top_k(record_of(log_p_TV, 30)), 5, 30)
    assert not got.rest_T.any()
    assert_close(got.probs_TK.sum(-1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    hidden_TG = torch.randn(TOKENS, 33, generator=torch.Generator().manual_seed(2)).to(dtype)
    data = encode_hidden(hidden_TG)
    assert decode_hidden(data, TOKENS, 33, dtype).equal(hidden_TG)
    with pytest.raises(DataError, match=f"more bytes where {49 * 33 * dtype.itemsize} were due"):
        decode_hidden(data, 49, 33, dtype)


def test_hidden_states_weigh_the_entropy_of_their_bytes() -> None:
    hidden_TG = torch.randn(2048, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    data = encode_hidden(hidden_TG)
    bits = 0.0
    for half in hidden_TG.view(torch.uint8).view(-1, 2).T:
        share = half.bincount(minlength=256).double() / len(half)
        bits -= float(torch.special.xlogy(share, share).sum()) / math.log(2) * len(half)
    # A whole number of bits a byte costs at most 0.086 bits plus the largest frequency more; a table a block, little.
    assert bits / 8 <= len(data) < 1.02 * bits / 8 < 0.75 * hidden_TG.nbytes


@pytest.mark.parametrize(
    "decode", [lambda data: decode_top_k(data, 4, 5), lambda data: decode_hidden(data, 4, 5, torch.float32)]
)
def test_a_damaged_record_is_named(decode) -> None:
    record, hidden = encode_top_k(record_of(log_probs()[:4], 5)), encode_hidden(torch.ones(4, 5))
    for data in (record[:-3], hidden[:-3], b"\xff" * 40):
        with pytest.raises(DataError, match="a stored target .* cache the teacher again"):
            decode(data)


def test_a_record_that_grows_without_end_is_refused_before_it_does() -> None:
    """Zeros, 64 MiB of them in 64 kB or less: nothing like it is ever in memory."""
    num_bytes = 2**26
    huffman = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    zeros = bytes(2**20)
    deflated = b"".join(huffman.compress(zeros) for _ in range(num_bytes // 2**20)) + huffman.flush()
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]
    coder = lzma.LZMACompressor(format=lzma.FORMAT_RAW, filters=filters)
    packed = b"".join(coder.compress(zeros) for _ in range(num_bytes // 2**20)) + coder.flush()
    assert max(len(deflated), len(packed)) < num_bytes / 1000
    for decode in (lambda: decode_top_k(packed, 4, 5), lambda: decode_hidden(deflated, 4, 5, torch.float32)):
        tracemalloc.start()
        with pytest.raises(DataError, match="a stored target has more bytes where .* were due"):
            decode()
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_any_sample_is_found_in_its_shard(tmp_path: Path) -> None:
    records = [bytes([i]) * (i + 1) for i in range(7)]
    for shard in range(num_shards(7, 3)):
        write_shard(tmp_path, shard, records[shard * 3 : (shard + 1) * 3])
    with pytest.raises(DataError, match="holds no stored targets; run recipes.cache_teacher"):
        StoredTargets(tmp_path)
    (tmp_path / METADATA).write_text(json.dumps({"samples": 7, "shard_samples": 3}))
    store = StoredTargets(tmp_path)
    assert [store.record(i) for i in (6, 0, 3, 2, 5)] == [records[i] for i in (6, 0, 3, 2, 5)]
    assert store.num_bytes() == sum(shard_path(tmp_path, i).stat().st_size for i in range(math.ceil(7 / 3)))
    with pytest.raises(DataError, match="targets of 7 samples, training asks for sample 7; raise cache.samples"):
        store.record(7)


def test_a_record_of_another_length_is_refused() -> None:
    data = encode_top_k(record_of(log_probs()[:4], 5))
    with pytest.raises(DataError, match="cache the teacher again"):
        decode_top_k(data, 4, 6)
