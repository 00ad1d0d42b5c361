"""Shares of a saving against hand-worked numbers, and timed layers held against a profile."""

import json
from dataclasses import replace

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.search.latency import PARTS, LatencyTable, sizes_of
from compactlm_nemo.search.profiled import profile_problems, read_teacher_time, refuse_other, scaled
from compactlm_nemo.search.saving import arrived, expected_ratios
from tests.support.shapes import TINY


def test_shares_by_hand():
    assert arrived(0.8, 0.75) == pytest.approx(0.8)  # 20 of 25 hundredths
    assert arrived(1.1, 0.5) == pytest.approx(-0.2) and arrived(0.5, 0.5) == 1.0
    assert arrived(0.9, 1.0) is None


def test_expected_ratios_by_hand():
    plain = replace(
        TINY, num_layers=2, hidden_size=4, ffn_hidden_size=8, num_heads=2, num_query_groups=2, head_dim=2,
        vocab_size=10, gated_mlp=True, layer_norm_1p=False, qkv_bias=False, tied_embeddings=False, window=None,
    )  # fmt: skip
    half = replace(plain, num_layers=1)
    # A layer: 4 matrices of 4 x 4 and 3 of 4 x 8, 2 norms of 4; the output layer 10 x 4; the final norm.
    weights = [n * (64 + 96 + 8) + 40 + 4 for n in (1, 2)]
    # 3 tokens read 1 + 2 + 3 keys, with 4 FLOPs for each of 2 heads of 2 channels; the last alone has logits.
    prompt = [n * (3 * 2 * 160 + 6 * 4 * 4) + 2 * 40 for n in (1, 2)]
    # Tokens 4 and 5 read 4 + 5 keys.
    answer = [n * (2 * 2 * 160 + 9 * 4 * 4) + 2 * 2 * 40 for n in (1, 2)]
    found = expected_ratios(plain, half, prompt=3, answer=2)
    for name, (student, teacher) in {"weights": weights, "prompt_flops": prompt, "answer_flops": answer}.items():
        assert found[name] == pytest.approx(student / teacher, rel=2e-3), name  # FLOPs a token are rounded down


def test_the_scaled_table_gives_the_teacher_its_time():
    small = replace(TINY, num_layers=1)
    times = {part: {sizes_of(part, TINY): ms} for part, ms in zip(PARTS, (2.0, 3.0, 4.0), strict=True)}
    table = scaled(LatencyTable({}, times), TINY, 140.0)
    assert table.milliseconds(TINY) == pytest.approx(140.0)
    assert table.milliseconds(small) == pytest.approx(140.0 * 9 / (TINY.num_layers * 5 + 4))


PROFILE = {
    "teacher": "t" * 64, "prompt_tokens": 16, "dtype": "float32",
    "engines": [{
        "engine": "transformers", "device": "a CPU",
        "models": {"teacher": {"batches": [{
            "batch": 2, "first_token_seconds": {"median": 0.25}, "step_seconds": {"median": 0.03}}]}},
    }],
}  # fmt: skip


def _config(tmp_path, *words):
    path = tmp_path / "profile.json"
    if not path.exists():
        path.write_text(json.dumps(PROFILE))
    given = ["search.latency_ms=9", f"search.latency_profile={path}", "search.batch=2", "search.context=16"]
    return compose(["run.dir=x", "model.source=y", "model.precision=fp32", *given, *words])


def test_the_time_of_each_phase(tmp_path):
    assert read_teacher_time(_config(tmp_path)).milliseconds == 250
    assert read_teacher_time(_config(tmp_path, "search.latency_phase=decode")).milliseconds == 30
    assert profile_problems(_config(tmp_path)) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("search.batch=3", "search.batch is 3 here and 2 there"),
        ("search.context=9", "search.context is 9 here and 16 there"),
        ("model.precision=bf16", "model.precision is bfloat16 here and float32 there"),
        ("search.latency_engine=vllm", "search.latency_engine is vllm here and transformers there"),
        ("parallel.tp=2", "is of one device, and the layout splits a model over 2"),
        ("search.latency_profile=gone.json", "gone.json is no profile.json"),
    ],
)
def test_a_profile_of_other_settings_is_refused_in_one_line(tmp_path, word, line):
    [problem] = profile_problems(_config(tmp_path, word))
    assert line in problem and "\n" not in problem


def test_a_profile_of_another_teacher_or_device_is_refused(tmp_path):
    time = read_teacher_time(_config(tmp_path))
    refuse_other(time, "p", teacher="t" * 64, device="a CPU")
    with pytest.raises(ConfigError, match="of the teacher ttt"):
        refuse_other(time, "p", teacher="u" * 64, device="a CPU")
    with pytest.raises(ConfigError, match="of the device a CPU, not of this run's a GPU"):
        refuse_other(time, "p", teacher="t" * 64, device="a GPU")


def test_settings_without_a_profile_are_refused():
    for word in ("search.latency_phase=decode", "search.latency_engine=vllm", "search.latency_profile=p.json"):
        with pytest.raises(ConfigError, match="search.latency_p|search.latency_e"):
            compose(["run.dir=x", "model.source=y", word])
