"""Documents that the teacher writes: the same in every layout, after a kill, and with any batch; as a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokenizer import load_tokenizer
from compactlm_nemo.data.windows import Corpus, calibration_windows, validation_windows
from compactlm_nemo.errors import ConfigError, Interrupted
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.stages import generate_pass
from compactlm_nemo.stages.context import Run
from compactlm_nemo.stages.generate import FILE
from compactlm_nemo.workflow.preflight import rule_problems
from compactlm_nemo.workflow.stage_table import STAGES, stages_of
from tests.support import commands
from tests.support.meshes import mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_run import command, make_inputs

OWN = ["data.train.own.generated=true", "generate.documents=9", "generate.max_tokens=20"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "inputs")


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher has been imported, has written, and whose texts are tokens."""
    folder = tmp_path_factory.mktemp("run") / "run"
    for recipe in ("import_model", "generate", "tokenize"):
        done = commands.run(command(inputs, folder, *OWN, recipe=recipe))
        assert done.returncode == 0, done.stderr
    return folder


def _config(folder: Path, *words: str) -> Config:
    texts = ["model.source=x", "data.train.a=a.jsonl", "data.heldout.a=b.jsonl", "data.sequence_length=16"]
    return compose([f"run.dir={folder}", *texts, *OWN, *words])


def _written(run: Path, folder: Path, mesh: Mesh, *words: str) -> list[str]:
    """Documents that the run's teacher writes in another run's folder."""
    folder.mkdir(exist_ok=True)
    if not (folder / "teacher").exists():
        (folder / "teacher").symlink_to(run / "teacher")
    generate_pass.write_documents(Run(_config(folder, *words), mesh, STAGES["generate"]), folder / FILE)
    return (folder / FILE).read_text().splitlines()


def _expected(run: Path) -> list[str]:
    return (run / "generated" / FILE).read_text().splitlines()


def test_each_document_is_drawn_as_transformers_full_pass_says(run: Path, inputs: Path) -> None:
    """Every token is one of the nucleus, and where the uniform number of its place falls first if that is in it."""
    import numpy

    tokenizer = load_tokenizer(run / "teacher" / "hf")
    model = AutoModelForCausalLM.from_pretrained(inputs / "teacher", dtype=torch.float64).eval()
    texts = [json.loads(line)["text"] for line in _expected(run)]
    assert len(texts) == 9
    seed, num_first = _config(run).run.seed, 0
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert 0 < len(ids) <= 20
        ids += [0] * (len(ids) < 20)  # the token that ends it
        with torch.no_grad():
            logits = model(torch.tensor([[0, *ids[:-1]]])).logits[0].numpy()
        uniform = numpy.random.default_rng([seed, number, 0]).random(20)
        for place, drawn in enumerate(ids):
            z = logits[place].copy()
            z[[1, 92] + [0] * (place == 0)] = -numpy.inf  # <unk>, a row without a token, and at first the end
            p = numpy.exp(z - z.max())
            p /= p.sum()
            order = numpy.argsort(-p, kind="stable")
            nucleus = order[: 1 + int((p[order].cumsum() < 0.98).sum())]
            assert drawn in nucleus
            first = int(numpy.searchsorted(p.cumsum(), uniform[place], side="right"))
            if first in nucleus:
                assert first == drawn
                num_first += 1
    assert num_first > 100


def test_the_manifest_counts_what_was_written(run: Path) -> None:
    results: dict[str, Any] = json.loads((run / "generated" / "manifest.json").read_text())["results"]
    assert results["documents"] == 9 and sum(results["ended_by"].values()) == 9
    tokens = json.loads((run / "tokens" / "manifest.json").read_text())["results"]["tokens"]
    # The token that ends a document was drawn, or put there by the tokenizer.
    assert tokens["train.own"] == results["tokens"] + results["ended_by"]["max_tokens"]
    assert results["equal_after_tokenising_again"] == 1.0


def _on_ranks(rank: int, world: int, run: Path, folder: Path, layout: dict[str, int], batch: int) -> None:
    assert _written(run, folder, mesh_of(**layout), f"generate.batch={batch}") == _expected(run)


@pytest.mark.parametrize(("world", "layout"), [(2, {}), (2, {"pp": 2}), (2, {"tp": 2})], ids=["dp2", "pp2", "tp2"])
def test_documents_depend_on_no_layout(world: int, layout: dict[str, int], run: Path, tmp_path: Path) -> None:
    run_ranks(_on_ranks, world, tmp_path, run, tmp_path / "other", layout, 2)


def _killed(rank: int, world: int, run: Path, folder: Path) -> None:
    mesh, steps = mesh_of(), 0
    plain = generate_pass.boundary  # type: ignore[attr-defined]

    def boundary(is_due: bool) -> tuple[int, bool]:
        nonlocal steps
        steps += 1
        return (15 if steps == 30 else 0), steps % 7 == 0

    generate_pass.boundary = boundary  # type: ignore[attr-defined]
    with pytest.raises(Interrupted, match="documents have ended, those that grow are kept"):
        _written(run, folder, mesh, "generate.batch=4")
    progress = folder / "progress" / "generate"
    assert list(progress.glob("ended_*.npz")) and (progress / "growing.npz").is_file() and not (folder / FILE).exists()
    kept = generate_pass._load(progress / "growing.npz")[0]
    assert max(map(len, kept.values())) > 1
    generate_pass.boundary = plain  # type: ignore[attr-defined]
    steps_before = generate_pass.Writing.step
    count = 0

    def step(self: Any) -> Any:
        nonlocal count
        count += 1
        return steps_before(self)

    generate_pass.Writing.step = step  # type: ignore[method-assign]
    assert _written(run, folder, mesh, "generate.batch=8") == _expected(run)
    assert count <= 20 and not progress.exists()


def test_a_stopped_stage_goes_on_with_every_document(run: Path, tmp_path: Path) -> None:
    run_ranks(_killed, 1, tmp_path, run, tmp_path / "killed")


PROBLEMS = [
    (["~data.train.own"], ["generate.documents=9 has no effect", "generate.max_tokens=20 has no effect"]),
    (["data.train.own.weight=0"], ["data.train.own.weight=0 has no effect without score.data.own"]),
    (["score.data.b=1"], ["score.data.b is no text of data.train, which has a, own"]),
    (["model.vocab_texts=a.jsonl"], ["tokens model.vocab_texts may not have kept"]),
    (["generate.max_tokens=9999"], ["generate.max_tokens=9999 must be <= 2048"]),
]


@pytest.mark.parametrize(("words", "told"), PROBLEMS)
def test_broken_rules_are_told(words: list[str], told: list[str], run: Path) -> None:
    config = _config(Path("runs/x"), *words)
    problems = rule_problems(config, Dims.load(run / "teacher" / MODEL))
    for text in told:
        assert any(text in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.train.b={path: a, generated: true}"], "must have a path or generated: true"),
        (["data.train.b={generated: true, key: x}"], "must have a path or generated: true"),
        (["data.train.b={weight: 1}"], "must be a path"),
        (["data.heldout.b={path: b, generated: true}"], "must be a path"),
        (["generate.top_p=0"], "must be in"),
        (["generate.temperature=0"], "must be > 0"),
        (["score.data.a=0"], "score.data.a=0 must be a number > 0"),
    ],
)
def test_wrong_values_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _config(Path("runs/x"), *words)


def test_the_stage_is_part_of_a_run_where_a_text_is_generated() -> None:
    with_own = _config(Path("runs/x"))
    assert stages_of(with_own)[:3] == ["import_model", "generate", "tokenize"]
    assert "generated" in STAGES["tokenize"].artifacts(with_own)
    without = compose(["run.dir=x", "model.source=y", "data.train.a=b"])
    assert "generate" not in stages_of(without) and "generated" not in STAGES["tokenize"].artifacts(without)


def test_calibration_draws_what_score_data_says(run: Path) -> None:
    """Windows of the training blend that calibration has not seen are those that validate."""
    config = _config(run, "data.train.own.weight=0", "score.data.own=1", "score.data.a=3", "score.samples=8")
    of_run = Run(config, None, STAGES["score"])  # type: ignore[arg-type]
    drawn = calibration_windows(of_run.calibration_corpora(), 8, 16, 5)
    own = calibration_windows([Corpus(run / "tokens" / "train.a", 1.0)], 6, 16, 5)
    rows = {tuple(row) for row in drawn.tolist()}
    assert len(rows) == 8 and len(rows & {tuple(row) for row in own.tolist()}) == 6
    assert [corpus.prefix.name for corpus in of_run.train_corpora()] == ["train.a"]
    after = validation_windows(of_run.train_corpora(), 8, 9, 16, 5, calibration=of_run.calibration_corpora())
    want = validation_windows([Corpus(run / "tokens" / "train.a", 1.0)], 6, 9, 16, 5)
    assert torch.equal(after, want)
