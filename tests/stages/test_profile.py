"""The profile stage with real transformers on a tiny model, and with stand-ins for llama.cpp's program and vLLM."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.config.profile import ProfileConfig
from compactlm_nemo.errors import CompactLMError, ConfigError
from compactlm_nemo.evaluation.generating import vllm_engine
from compactlm_nemo.evaluation.llama_cpp import Bench
from compactlm_nemo.evaluation.speed import Timed, check_counts, ratios, summary, take_turns
from compactlm_nemo.stages.profile import profile_problems, with_engines
from tests.support import commands
from tests.support.tiny_run import command, make_inputs

SMALL = [
    "profile.batches=[1,2]", "profile.prompts=2", "profile.prompt_tokens=8", "profile.new_tokens=3",
    "profile.repeats=1", "profile.threads=1", "export.of=student",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an exported student."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "export"):
        done = commands.run(command(inputs, folder, "export.of=student", recipe=recipe))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_kill_leaves_nothing_and_the_next_start_measures_all(inputs: Path, run: Path, tmp_path: Path) -> None:
    """Killed while a model answers, and started again by a command of the page."""
    words = command(inputs, run, *SMALL, "profile.repeats=1000000", recipe="profile")
    process = commands.start(words, tmp_path / "out", tmp_path / "err")
    end = time.monotonic() + 300
    while not (run / "profile" / "scratch" / "teacher" / "model.safetensors").exists():
        assert time.monotonic() < end and process.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not (run / "profile" / "profile.json").exists() and not (run / "profile" / "manifest.json").exists()
    page = re.findall(r"```bash\n(.*?)```", (CONF.parent / "docs" / "profile.md").read_text(), re.S)[0]
    text = page.replace("runs/mine", str(run)).replace("/models/llama", f"{inputs}/teacher")
    text = text.replace("data.train.web=web.jsonl", f"data.train.a={inputs}/train.jsonl")
    python, *asked = shlex.split(text.replace("data.heldout.test=test.jsonl", f"data.heldout.a={inputs}/test.jsonl"))
    settings = [word for word in words if word.startswith(("data.sequence", "search.", "score.", "distill.", "eval"))]
    done = commands.run([*asked, *settings, *SMALL])
    assert python == "python" and done.returncode == 0, done.stderr
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["manifest.json", "profile.json", "profile.md"]
    found = json.loads((run / "profile" / "profile.json").read_text())
    assert (found["exported"], found["text"], found["dtype"]) == ("student", "a", "float32")
    [engine] = found["engines"]
    assert engine["engine"] == "transformers" and engine["threads"] == 1 and engine["device"] and engine["version"]
    for name, params in (("teacher", 40128), ("student", 10032)):
        assert found["models"][name] == {"params": params, "weight_bytes": 4 * params}
        model = engine["models"][name]
        assert model["disk_bytes"] > 4 * params and model["peak_bytes"] > 0
        assert [(row["batch"], row["generated_tokens"]) for row in model["batches"]] == [(1, 3), (2, 6)]
        for row in model["batches"]:
            for figure in ("first_token_seconds", "step_seconds", "decode_tokens_per_second", "tokens_per_second"):
                assert 0 < row[figure]["low"] <= row[figure]["median"] <= row[figure]["high"]
    for row in engine["ratios"]:
        share = row["prefill"]["share_of_saving"]["prompt_flops"]
        expected = 1 - found["expected"]["prompt_flops"]
        assert share == pytest.approx((1 - row["prefill"]["median"]) / expected)
        assert row["decode"]["share_of_saving"].keys() == {"weights", "answer_flops"}
    assert "share of the saving" in (run / "profile" / "profile.md").read_text()


class Fixed:
    """A model whose seconds are known."""

    about: dict[str, object] = {}
    disk_bytes = 0

    def __init__(self, name: str, seconds: float, seen: list[str]) -> None:
        self.name, self.seconds, self.seen = name, seconds, seen

    def answer(self, batch: int, turn: int) -> Timed:
        self.seen.append(f"{self.name}{batch}.{turn}")
        return Timed(self.seconds * batch, self.seconds / 2, 3 * batch, self.seconds * batch + self.seconds)

    def peak_bytes(self) -> None:
        return None

    def close(self) -> None: ...


def test_models_take_turns_and_figures_are_by_hand() -> None:
    seen: list[str] = []
    models = {"teacher": Fixed("t", 4.0, seen), "student": Fixed("s", 3.0, seen)}
    found = take_turns(models, [2], 2, lambda count: None)
    assert seen == ["s2.0", "t2.0", "t2.1", "s2.1", "s2.2", "t2.2"]
    row = summary(2, found["teacher"][2])
    assert (row["generated_tokens"], row["first_token_seconds"]["median"]) == (6, 8.0)
    assert row["decode_tokens_per_second"]["median"] == 1.0 and row["tokens_per_second"]["median"] == 0.5
    one, two = Timed(1, 1, 1, 1), Timed(2, 4, 1, 1)
    spread = ratios([one, two, one], [two, two, one])["prefill"]
    assert (spread.median, spread.low, spread.high) == (1, 1, 2)


def test_answers_of_another_length_are_refused() -> None:
    check_counts("x", [3, 3], 2, 3)
    for counts in ([3, 2], [3], [3, 3, 3]):
        with pytest.raises(CompactLMError, match="not 3 for each of 2 prompts"):
            check_counts("x", counts, 2, 3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["profile.engines=[vllm]"], "profile.engines=[vllm] needs vLLM, which is not installed here"),
        (["profile.engines=[llama_cpp]", "profile.converter=gone"], "profile.converter=gone is no file"),
        (["profile.engines=[llama_cpp]"], "needs llama.cpp's llama-batched-bench, which is not on PATH"),
        (["profile.text=b"], "profile.text=b is none of data.heldout"),
        (["export.format=bridge"], "not export.format=bridge"),
        (["export.of=teacher"], "export.of=teacher exports none"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = with_engines(compose(["run.dir=x", "model.source=y", "data.heldout.a=a.jsonl", *words]))
    assert any(line in problem and "\n" not in problem for problem in profile_problems(config, []))


@pytest.mark.parametrize(
    "word",
    ["new_tokens=1", "batches=[]", "batches=[1,1]", "prompts=3", "repeats=0", "llama_cpp=x", "threads=0"],
)
def test_bad_settings_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"profile.{word.partition('=')[0]}"):
        compose(["run.dir=x", "model.source=y", f"profile.{word}"])


def test_the_bench_of_llama_cpp_is_read(tmp_path: Path) -> None:
    """A stand-in that prints what llama-batched-bench of llama.cpp prints; -npl 3 answers with other numbers."""
    program = tmp_path / "bench"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('version: 7 (abc)'); sys.exit()\n"
        "at = {a: b for a, b in zip(sys.argv, sys.argv[1:])}\nprint('loading')\n"
        "n = 1 if at['-npl'] == '3' else int(at['-ntg'])\nassert int(at['-c']) >= 256\n"
        'print(\'{"pp": %s, "tg": %d, "pl": %s, "t_pp": 0.5, "t_tg": 2.0}\' % (at["-npp"], n, at["-npl"]))\n'
    )
    program.chmod(0o755)
    (tmp_path / "m.gguf").write_bytes(b"12345")
    cfg = ProfileConfig(new_tokens=4, batches=[2], llama_cpp=None)
    cfg.llama_cpp = str(program)
    bench = Bench("student", tmp_path / "m.gguf", cfg, 1)
    assert bench.answer(2, 0) == Timed(0.5, 0.5, 8, 2.5) and bench.disk_bytes == 5
    assert bench.about["version"] == "version: 7 (abc)"
    with pytest.raises(CompactLMError, match=r"generated \[1, 1, 1\] tokens, not 4"):
        bench.answer(3, 0)


VLLM = """
from types import SimpleNamespace as N
class EngineArgs:
    def __init__(self, **words): assert words["enable_prefix_caching"] is False
class SamplingParams:
    def __init__(self, **words): assert words["ignore_eos"]; self.n = words["max_tokens"]
class LLMEngine:
    from_engine_args = classmethod(lambda cls, args: cls())
    def __init__(self): self.asked = {}
    def add_request(self, name, prompt, wanted): self.asked[name] = [0, wanted.n]
    def has_unfinished_requests(self): return any(have < n for have, n in self.asked.values())
    def step(self):
        for each in self.asked.values(): each[0] = min(each[1], each[0] + 1)
        return [N(request_id=k, outputs=[N(token_ids=[0] * v[0])]) for k, v in self.asked.items()]
"""


def test_vllm_is_asked_as_its_stand_in_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "vllm" / "inputs.py").write_text("def TokensPrompt(**words): return words\n")
    monkeypatch.syspath_prepend(tmp_path)
    generate, peak_bytes = vllm_engine({"folder": "x", "dtype": "float32", "length": 9, "batch": 2})
    first, decode, counts = generate([[1, 2], [3, 4]], 5)
    assert first >= 0 and decode >= 0 and counts == [5, 5] and peak_bytes() is None
