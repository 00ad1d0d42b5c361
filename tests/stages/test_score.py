"""The score stage as users run it: killed, continued with more samples, stopped early, on two ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compactlm_nemo.artifacts import read_manifest, write_manifest
from compactlm_nemo.config.load import compose
from compactlm_nemo.data.windows import Corpus, calibration_windows
from compactlm_nemo.evaluation.harness import accuracy, run_tasks
from compactlm_nemo.importance.moments import MomentSource
from compactlm_nemo.importance.score_state import ScoreState
from compactlm_nemo.importance.scores import load_scores
from tests.importance.reference import reference
from tests.support import commands
from tests.support.tiny_run import command

FEW = [
    "score.samples=24", "score.micro_batch=2", "score.save_every=2", "score.width=[mean_var,l2_mean]",
    "score.depth=[bi,lm_loss]", "score.depth_samples=6", "score.second_moments=true",
]  # fmt: skip


def _words(inputs: Path, run: Path, *overrides: str) -> list[str]:
    return command(inputs, run, *FEW, *overrides, recipe="score")


def _run(words: list[str], ranks: int = 1) -> tuple[int, str]:
    done = commands.run(words, ranks=ranks)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def ready(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher and tokens are there."""
    run = tmp_path_factory.mktemp("runs") / "ready"
    for recipe in ("import_model", "tokenize"):
        assert _run(command(inputs, run, recipe=recipe)) == (0, "")
    return run


@pytest.fixture(scope="module")
def scored(inputs: Path, ready: Path) -> Path:
    run = Path(shutil.copytree(ready, ready.with_name("scored")))
    status, errors = _run(_words(inputs, run))
    assert status == 0, errors
    assert not (run / "progress" / "score").exists()
    return run


def _stored(run: Path) -> dict[str, Any]:
    return {name: (run / "score" / name).read_bytes() for name in ("scores.safetensors", "state.safetensors")}


def _windows(run: Path, samples: int) -> torch.Tensor:
    return calibration_windows([Corpus(run / "tokens" / "train.a", 1.0)], samples, 16, 1234)


def test_scores_are_those_of_the_calibration_tokens_in_the_manifest(inputs: Path, scored: Path) -> None:
    ids = _windows(scored, 24)
    manifest = json.loads((scored / "score" / "manifest.json").read_text())["results"]
    scores = load_scores(scored / "score")
    assert scores.metadata["calibration"] == manifest["calibration"]
    assert (
        manifest["calibration"]
        == hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in ids.flatten())).hexdigest()
    )
    want = reference(AutoModelForCausalLM.from_pretrained(inputs / "teacher", attn_implementation="eager"), ids)
    for name in ("l2_mean.hidden", "mean_var.layers.1.mlp", "l2_mean.layers.3.heads", "depth.bi"):
        torch.testing.assert_close(scores.tensors[name].double(), want[name], rtol=1e-5, atol=1e-7)
    assert scores.ranking(None, None)["hidden"].equal(scores.width("mean_var")["hidden"])
    assert scores.width_metrics == ["mean_var", "l2_mean"] and scores.depth_metrics == ["bi", "lm_loss"]


def test_a_killed_run_goes_on_to_the_same_bits(inputs: Path, ready: Path, scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ready, tmp_path / "run"))
    kept = run / "progress" / "score" / "state.safetensors"
    seen = []
    for least in (1, 9):  # among the activations, twice
        process = commands.start(_words(inputs, run), tmp_path / "out", tmp_path / "err")
        while process.is_alive() and (not kept.exists() or ScoreState.load(kept).samples < least):
            time.sleep(0.002)
        process.kill()
        process.join()
        seen.append(ScoreState.load(kept).samples)
    assert 0 < seen[0] <= seen[1] and seen[0] < 24 and not (run / "score" / "manifest.json").exists()
    status, errors = _run(_words(inputs, run))
    assert status == 0, errors
    assert _stored(run) == _stored(scored)
    want, got = (MomentSource(path / "score" / "moments") for path in (scored, run))
    assert got.tokens == want.tokens == 24 * 16
    assert all(torch.equal(got.whole(name), want.whole(name)) for name in want.sizes)


def test_killed_gradients_go_on_to_the_same_bits(inputs: Path, ready: Path, tmp_path: Path) -> None:
    words = [*FEW[:2], "score.save_every=2", "score.width=[taylor]", "score.depth=[lm_loss]", "score.depth_samples=2"]
    runs = [Path(shutil.copytree(ready, tmp_path / name)) for name in ("whole", "killed")]
    assert _run(command(inputs, runs[0], *words, recipe="score"))[0] == 0
    process = commands.start(command(inputs, runs[1], *words, recipe="score"), tmp_path / "out", tmp_path / "err")
    while process.is_alive() and not (runs[1] / "progress" / "score" / "taylor_4_rank_0.safetensors").exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert 4 <= ScoreState.load(runs[1] / "progress" / "score" / "state.safetensors").summed["taylor"] + 2 < 24
    status, errors = _run(command(inputs, runs[1], *words, "parallel.tp=2", recipe="score"), ranks=2)
    assert status == 2 and "another parallel.tp" in errors
    status, errors = _run(command(inputs, runs[1], *words, recipe="score"))
    assert status == 0, errors
    assert _stored(runs[0]) == _stored(runs[1])


def test_two_ranks_give_the_same_scores(inputs: Path, ready: Path, scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ready, tmp_path / "run"))
    status, errors = _run(_words(inputs, run, "parallel.tp=2", "parallel.sequence_parallel=true"), ranks=2)
    assert status == 0, errors
    one, two = (load_file(path / "score" / "scores.safetensors") for path in (scored, run))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5 * float(one[name].abs().max()))
    assert (run / "score" / "moments").is_dir()


def test_samples_are_added_to_a_finished_file(inputs: Path, ready: Path, scored: Path, tmp_path: Path) -> None:
    plain = ["score.second_moments=false", "score.depth=[bi]", "score.samples=31"]
    whole, added = (Path(shutil.copytree(ready, tmp_path / name)) for name in ("whole", "added"))
    assert _run(_words(inputs, whole, *plain))[0] == 0
    status, errors = _run(_words(inputs, added, *plain, f"score.start_from={scored}/score"))
    assert status == 0, errors
    assert json.loads((added / "score" / "manifest.json").read_text())["results"]["samples"] == 31
    assert _stored(added)["scores.safetensors"] == _stored(whole)["scores.safetensors"]
    other = Path(shutil.copytree(ready, tmp_path / "other"))
    for change, words in (
        (["run.seed=5"], "was measured with another calibration"),
        (["score.neurons=before"], "was measured with another neurons"),
        (["score.width=[l2_l2]"], "lacks what score.width=['l2_l2'] needs"),
        (["score.samples=20"], "score.samples=20 is less than the 24"),
    ):
        status, errors = _run(_words(inputs, other, *plain, f"score.start_from={scored}/score", *change))
        assert status == 2 and words in errors and len(errors.splitlines()) == 1, errors
        shutil.rmtree(other / "progress" / "score", ignore_errors=True)
        shutil.rmtree(other / "score", ignore_errors=True)


def _tau(a: list[float], b: list[float]) -> float:
    """Kendall's tau of two vectors without ties."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    return sum(1 if (a[i] > a[j]) == (b[i] > b[j]) else -1 for i, j in pairs) / len(pairs)


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest 1 - tau of an axis of the metric l2_mean, mean over layers, or of block importance."""
    axes: dict[str, list[float]] = {}
    for name, vector in after.items():
        if name.startswith("l2_mean.") or name == "depth.bi":
            axes.setdefault(name.split(".")[-1], []).append(_tau(before[name].tolist(), vector.tolist()))
    return max(1 - sum(taus) / len(taus) for taus in axes.values())


def test_it_stops_early_when_ranks_stand_still(inputs: Path, ready: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs / "teacher", attn_implementation="eager")
    seen = [reference(model, _windows(ready, samples)) for samples in range(4, 49, 4)]
    moves = [_moved(before, after) for before, after in zip(seen, seen[1:], strict=False)]
    tolerance = sorted(max(pair) for pair in zip(moves, moves[1:], strict=False))[2] + 1e-6
    calm = [max(pair) <= tolerance for pair in zip(moves, moves[1:], strict=False)]
    want = 4 * (calm.index(True) + 3)  # the later of the two comparisons is with this many samples
    assert tolerance < 1 and want < 48
    run = Path(shutil.copytree(ready, tmp_path / "run"))
    rule = [f"score.stop_tolerance={tolerance}", "score.stop_checks=2", "score.width=[l2_mean]", "score.depth=[bi]"]
    rest = ["score.samples=48", "score.save_every=4", "score.second_moments=false"]
    status, errors = _run(_words(inputs, run, *rule, *rest))
    assert status == 0, errors
    assert json.loads((run / "score" / "manifest.json").read_text())["results"]["samples"] == want
    digest = hashlib.sha256(_windows(run, want).numpy().tobytes()).hexdigest()
    assert load_scores(run / "score").metadata["calibration"] == digest


@pytest.mark.slow
def test_tasks_rank_layers_by_the_accuracy_they_hold(inputs: Path, ready: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ready, tmp_path / "run"))
    document = [
        {"question": f"w{i} w{2 * i} w{3 * i}", "choices": [f"w{i + 5}", f"w{i + 9}"], "answer": i % 2}
        for i in range(24)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, document)) + "\n")
    text = (inputs / "tasks" / "own.yaml").read_text().replace(str(inputs / "task.json"), str(tmp_path / "data.json"))
    (tmp_path / "tasks" / "own.yaml").write_text(text)
    settings = ["evaluate.tasks=[own_choice]", f"evaluate.task_folder={tmp_path}/tasks"]
    only_tasks = ["score.depth=[tasks]", "score.task_block=2", "score.second_moments=false"]
    status, errors = _run(_words(inputs, run, *settings, *only_tasks))
    assert status == 0, errors
    got = load_scores(run / "score").depth("tasks")
    model = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    cfg = compose([*command(inputs, run)[2:], *settings]).evaluate
    every = model.model.layers
    found = []
    for left_out in ([], [1, 2]):
        model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(every) if i not in left_out)
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = place
        model.config.num_hidden_layers = len(model.model.layers)
        shutil.copytree(inputs / "teacher", tmp_path / "short", dirs_exist_ok=True)
        model.save_pretrained(tmp_path / "short")
        found.append(accuracy(run_tasks(tmp_path / "short", cfg)))
    assert len(set(got[:3].tolist())) > 1, "the task tells layers apart"
    torch.testing.assert_close(got[1], torch.tensor(found[0] - found[1]))
    assert got[3].isnan()


def test_bad_input_ends_in_one_line(inputs: Path, ready: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ready, tmp_path / "run"))
    status, errors = _run(_words(inputs, run, "score.samples=4000"))
    assert status == 2 and "its share of score.samples=4000 is 4000" in errors and len(errors.splitlines()) == 1, errors
    spoilt = Path(shutil.copytree(inputs / "teacher", tmp_path / "teacher"))
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][0] = 3e38  # finite, and what it makes is not
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    bad = [f"model.source={spoilt}"]
    for recipe in ("import_model", "tokenize"):
        assert _run(command(inputs, tmp_path / "nan", *bad, recipe=recipe))[0] == 0
    status, errors = _run(_words(inputs, tmp_path / "nan", *bad))
    assert status == 2 and "layer 2 heads activations are NaN or infinite" in errors, errors
    assert len(errors.splitlines()) == 1


def test_scores_of_another_model_are_refused(inputs: Path, scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    scores = load_file(run / "score" / "scores.safetensors")
    save_file(scores, run / "score" / "scores.safetensors", metadata={"metadata": json.dumps({"model": "another"})})
    manifest = read_manifest(run / "score")
    write_manifest(run / "score", manifest["settings"], manifest["inputs"], manifest["results"])  # as the stage's own
    status, errors = _run(command(inputs, run, *FEW, recipe="search"))
    assert status == 2 and "holds scores of another model" in errors and len(errors.splitlines()) == 1, errors
