"""Every experiment composes and plans; every documented command runs; bad input ends in one line and exit code 2."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compactlm_nemo.config import load
from compactlm_nemo.config.load import (
    COMPARE,
    COMPARE_RUNS,
    CONF,
    DASHBOARD,
    GATE,
    PLAN,
    STATUS,
    SUBMIT,
    VERIFY,
    compose,
    compose_root,
    schema_reference,
)
from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.workflow import runner
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.manual import reference_markdown
from compactlm_nemo.workflow.runner import run_stages
from compactlm_nemo.workflow.stage_table import STAGES, stages_of
from compactlm_nemo.workflow.submit import split_words
from tests.support import commands

ROOT = CONF.parent
OWN_ROOTS = {root.file: root for root in (COMPARE, COMPARE_RUNS, DASHBOARD, GATE, PLAN, STATUS, VERIFY)}
"""Roots of the recipes with settings of their own, by recipe."""
EXPERIMENTS, MODELS, CLUSTERS, GATES = (
    sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in ("experiment", "model", "cluster", "gate")
)
# Published sizes: arXiv 2407.14679 tables 1 and 5 (15.6B, 8.27B, 4.19B), arXiv 2408.11796 (8.0B, 4.5B; 12.2B, 8.4B).
PUBLISHED_BILLIONS = {
    "nemotron4_15b_to_8b": (15.6, 8.27),
    "nemotron4_15b_to_4b": (15.6, 4.19),
    "llama31_8b_to_4b_width": (8.03, 4.51),
    "llama31_8b_to_4b_depth": (8.03, 4.54),
    "mistral_nemo_12b_to_8b": (12.2, 8.4),
}
# Teachers' sizes: arXiv 2407.21783 (70.6B), 2406.11704 (9.4B embedding, 331.6B other parameters), 2505.09388 (235B);
# nobody has published these students.
PLANNED_BILLIONS = {
    "llama31_70b_to_35b": (70.6, 34.8),
    "nemotron4_340b_to_170b": (341.0, 169.4),
    "qwen3_235b_to_120b": (235.1, 121.5),
}


def _dry(experiment: str) -> list[str]:
    """Return a dry run that tells no memory, as that is simulated."""
    return [f"experiment={experiment}", "dry_run=true", "model.source=absent", "cluster.device=null"]


@pytest.mark.parametrize("experiment", sorted(PUBLISHED_BILLIONS))
def test_an_experiment_plans_the_published_sizes(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(_dry(experiment))
    run_stages(config)
    out = capsys.readouterr().out
    teacher, student = (
        float(re.search(rf"^{who}.*?: ([\d,]+) parameters", out, re.M)[1].replace(",", "")) / 1e9  # type: ignore[index]
        for who in ("teacher", "student")
    )
    want_teacher, want_student = PUBLISHED_BILLIONS[experiment]
    assert teacher == pytest.approx(want_teacher, abs=0.06)
    assert student == pytest.approx(want_student, abs=0.02)
    assert f"ranks needed: a multiple of tp {config.parallel.tp} x pp 1 = {config.parallel.tp}" in out
    for stage in map(STAGES.get, stages_of(config)):
        assert re.search(rf"^{stage.name}: .*writes runs/{experiment}/{stage.writes}$", out, re.M)


@pytest.mark.parametrize("experiment", sorted(PLANNED_BILLIONS))
def test_an_experiment_that_is_planned_alone_has_the_sizes_it_says(
    experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(_dry(experiment))
    run_stages(config)
    sizes = re.findall(r"^(?:teacher|student).*?: ([\d,]+) parameters", capsys.readouterr().out, re.M)
    billions = [float(size.replace(",", "")) / 1e9 for size in sizes]
    assert billions == pytest.approx(PLANNED_BILLIONS[experiment], abs=0.06)
    tokens = config.distill.num_samples * config.data.sequence_length
    assert tokens == pytest.approx(94e9, rel=0.001)
    assert "planned and not run" in (CONF / "experiment" / f"{experiment}.yaml").read_text()


@pytest.mark.parametrize("experiment", sorted(PUBLISHED_BILLIONS))
def test_an_experiment_runs_on_any_number_of_nodes(experiment: str) -> None:
    config = compose(_dry(experiment))
    assert [launch_problems(config, 8 * nodes) for nodes in (1, 2, 4, 8, 16)] == [""] * 5
    assert config.parallel.sequence_parallel and config.distill.overlap
    assert launch_problems(config, 8 * 7), "7 nodes do not divide the batch"


def test_the_largest_candidate_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["search.batch=4", "search.context=2048", "search.bytes_per_value=2", "search.latency_ms=20"]
    run_stages(compose([*_dry("llama31_8b_to_4b_depth"), *settings]))
    out = capsys.readouterr().out
    # 16 layers of Llama 3.1, counted by hand; a query reads 2049 / 2 keys on average.
    outside, norms = 2 * 128256 * 4096, 33 * 4096
    layer = 2 * (32 + 8) * 128 * 4096 + 3 * 4096 * 14336
    kv = 16 * 2 * 8 * 128 * 2
    assert f"  {16 * layer + norms:,} parameters outside the embeddings, {16 * layer + norms + outside:,} active" in out
    assert f"{2 * (16 * layer + norms + outside) + 4 * 2048 * kv:,} bytes for weights and 4 x 2048 tokens" in out
    assert f"{2 * 16 * layer + outside + 16 * 4 * 32 * 128 * 2049 // 2:,} FLOPs a token at 2048 tokens" in out
    assert "search.latency_ms=20 is checked by the search stage" in out


@pytest.mark.parametrize("rule", ["search.multiples.hidden=64", "search.divisors=[ffn]", "search.latency_ms=9"])
def test_a_search_that_depends_on_the_layout_is_not_taken_for_another(rule: str) -> None:
    axes = ["search.hidden=[]", "search.ffn=[]"]

    def identity(*settings: str) -> object:
        return STAGES["search"].settings(compose([*_dry("llama31_8b_to_4b_depth"), *axes, *settings]))

    assert identity(rule, "parallel.tp=4") != identity(rule, "parallel.tp=8")
    assert identity("parallel.tp=4") == identity("parallel.tp=8")


@pytest.mark.parametrize(
    "words, line",
    [
        (["cluster=h100_sxm", "nodes=4"], "meant for: nodes=4 x 8 H100 SXM = 32 ranks; memory is told"),
        (["cluster.device=null", "nodes=4"], "meant for: nodes=4 of a cluster without a name; cluster=NAME names it"),
        (["cluster.device=null"], ""),
    ],
)
def test_a_dry_run_of_any_recipe_says_where_the_run_is_meant_to_be(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "planned_lines", lambda *_: [])  # tests/workflow/test_memory_guard.py has them
    run_stages(compose([*_dry("llama31_8b_to_4b_depth")[:-1], "nodes=1", *words]), only="score")
    lines = [each for each in capsys.readouterr().out.splitlines() if each.startswith("meant for")]
    assert len(lines) == bool(line) and all(each.startswith(line) for each in lines)


def test_an_experiment_names_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    experiment = (
        "# @package _global_\ndefaults:\n  - override /cluster: h200\n  - _self_\nnodes: 3\ncluster:\n  price_hour: 7\n"
    )
    (tmp_path / "conf" / "experiment" / "there.yaml").write_text(experiment)
    monkeypatch.setattr(load, "CONF", tmp_path / "conf")
    words = ["experiment=there", "model.source=absent", "run.dir=x"]
    config = compose(words)
    assert (config.nodes, config.meant_ranks) == (3, 24)
    assert (config.cluster.device, config.cluster.price_hour) == ("H200 SXM", 7)
    assert compose([*words, "cluster=a100_40gb", "nodes=1"]).meant_ranks == 8
    with pytest.raises(CompactLMError, match="nodes=0 must be > 0"):
        compose([*words, "nodes=0"])
    assert compose_root(PLAN, words) == config


def test_every_experiment_composes() -> None:
    assert {*PUBLISHED_BILLIONS, *PLANNED_BILLIONS, "smollm2_135m_cpu", "gemma3_270m_cpu"} == set(EXPERIMENTS)
    for experiment in EXPERIMENTS:
        assert compose(_dry(experiment)).dry_run


def test_every_model_composes_alone_and_an_experiment_uses_it() -> None:
    experiments = "".join((CONF / "experiment" / f"{name}.yaml").read_text() for name in EXPERIMENTS)
    for model in MODELS:
        assert f"- override /model: {model}\n" in experiments
        architecture = compose([f"model={model}", "run.dir=x", "model.source=absent"]).model.architecture
        assert architecture["num_hidden_layers"] > 0 and architecture["vocab_size"] > 0


def test_a_model_yields_to_the_experiment_and_that_to_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    experiment = (
        "# @package _global_\ndefaults:\n  - override /model: nemotron4_15b\n  - _self_\n"
        "model:\n  architecture:\n    hidden_size: 2\n    num_hidden_layers: 2\n"
    )
    (tmp_path / "conf" / "experiment" / "small.yaml").write_text(experiment)
    monkeypatch.setattr(load, "CONF", tmp_path / "conf")
    words = [*_dry("small"), "run.dir=x", "model.architecture.num_hidden_layers=3"]
    architecture = compose(words).model.architecture
    # From the command line, the experiment and the model, in this order.
    assert [architecture[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")] == [3, 2, 256000]
    assert compose([*words, "model=llama31_8b"]).model.architecture["vocab_size"] == 128256


def test_per_rank_sizes_add_up_under_another_layout(capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(
        compose([*_dry("nemotron4_15b_to_8b"), "parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=4"])
    )
    out = capsys.readouterr().out.split("\nstudent")[0]
    stages = [int(n.replace(",", "")) for n in re.findall(r"pipeline stage \d: ([\d,]+) parameters", out)]
    assert sum(stages) == 15_628_775_424  # vocabulary 256000 needs no padding, embeddings are untied: nothing is twice


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["distill.stepz=3"], ["distill.stepz"]),
        (["experiment=smollm2_135m_cpu", "distill.lr=-1"], ["distill.lr=-1", "> 0"]),
        (["distill.steps=many"], ["many"]),
        (["distill.recompute=true"], ["distill.recompute=true", "full was true and none was false"]),
        (["experiment=nothing"], ["nothing"]),
        (["experiment=null"], ["leave the override out"]),
        (["model=nothing"], ["model/nothing", *MODELS]),
        (["run.dir=x"], ["model.source"]),
        (["run.dir=x", "model.source=absent", "data.train.a=gone"], ["model.source=absent", "data.train.a.path=gone"]),
        ([*_dry("llama31_8b_to_4b_width"), "parallel.tp=3"], ["parallel.tp=3"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_useful_message(overrides: list[str], words: list[str]) -> None:
    result = commands.run(["-m", "recipes.compress", *overrides])
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "provider=" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (ROOT / "x").exists()


def test_cross_field_problems_are_listed_together() -> None:
    with pytest.raises(CompactLMError) as caught:
        run_stages(
            compose([*_dry("llama31_8b_to_4b_width"), "parallel.tp=3", "parallel.pp=50", "distill.micro_batch=7"])
        )
    for word in ("parallel.tp=3", "parallel.pp=50", "distill.micro_batch=7"):
        assert word in str(caught.value)


def test_help_names_every_setting() -> None:
    words = [sys.executable, "-m", "recipes.distill", "--help"]  # as from a shell
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    groups = {"experiment": EXPERIMENTS, "model": MODELS, "cluster": CLUSTERS, "gate": GATES}
    assert "".join(f"{group}s: {', '.join(names)}\n" for group, names in groups.items()) in result.stdout
    for key, _, meaning, _ in schema_reference():
        assert key in result.stdout
        assert meaning, f"{key} has no docstring"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_verb_plans(stage: str) -> None:
    result = commands.run(["-m", f"recipes.{stage}", *_dry("llama31_8b_to_4b_depth")])
    assert result.returncode == 0, result.stderr
    assert STAGES[stage].writes in result.stdout


def documented_commands() -> list[str]:
    """Every `python -m recipes...` or torchrun line in a code block of the documents."""
    lines: list[str] = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.md"))]:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.S):
            joined = block.replace("\\\n", " ")
            lines += [line.strip() for line in joined.splitlines() if re.search(r"-m (recipes|slurm)\.", line)]
    return lines


def test_documented_commands_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "planned_lines", lambda *_: [])  # seconds each; tests/planning has the experiments
    commands = documented_commands()
    assert commands
    for command in commands:
        words = shlex.split(command)
        module = next((word for word in words if word.startswith(("recipes.", "slurm."))), None)
        if module is None:
            continue  # a shell's own command around one with flags
        rest = words[words.index(module) + 1 :]
        if any(word.startswith("-") for word in rest):
            continue  # tests/config/test_command_line.py runs those with flags
        own = OWN_ROOTS.get(module.removeprefix("recipes."))
        rest = own.overrides(rest) if own else rest
        rest = [word for word in rest if "=" in word]
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
        if module in ("recipes.submit", "slurm.nemo_run"):
            of_job, (recipe, *rest) = split_words(words[words.index(module) + 1 :])
            job = compose_root(SUBMIT, of_job)
            assert (ROOT / "recipes" / f"{recipe}.py").is_file(), command
            run = compose(rest)
            assert launch_problems(run, run.nodes * job.site.gpus_per_node) == "", command
        if (root := OWN_ROOTS.get(module.removeprefix("recipes."))) is not None:
            compose_root(root, rest)
            continue
        config = compose([*rest, "dry_run=true"])
        if config.model.architecture:
            run_stages(config)


@pytest.mark.slow
def test_slurm_commands_plan() -> None:
    """In slurm/README.md a recipe and overrides that compose follow the batch script; NAME is any experiment."""
    text = (ROOT / "slurm" / "README.md").read_text().replace("\\\n", " ").replace("NAME", "nemotron4_15b_to_8b")
    commands = re.findall(r"slurm/run\.sbatch (\w+) ((?:[\w.]+=\S+ *)+)", text)
    assert len(commands) == text.count("slurm/run.sbatch ") and len(commands) >= 4
    for recipe, words in commands:
        assert (ROOT / "recipes" / f"{recipe}.py").is_file()
        overrides = words.replace(")", "").split()
        if (root := OWN_ROOTS.get(recipe)) is not None:
            compose_root(root, overrides)
            continue
        source = [] if "model.source" in words else ["model.source=absent"]
        run_stages(compose([*overrides, *source, "dry_run=true"]))


def test_the_configuration_reference_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference_markdown()


def test_make_compress_is_the_two_recipes() -> None:
    done = subprocess.run(["make", "-n", "compress", "ARGS=dry_run=true"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if "recipes." in line]
    assert [words[2] for words in commands] == ["recipes.fetch", "recipes.compress"]
    for words in commands:
        assert compose(words[3:]).run.dir == "runs/smollm2_135m_cpu"
    assert compose(commands[1][3:]).dry_run
    words = ["make", "-n", "compress", "ARGS=experiment=gemma3_270m_cpu distill.steps=7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    fetched, compressed = (shlex.split(line)[3:] for line in done.stdout.splitlines() if "recipes." in line)
    assert fetched == ["experiment=gemma3_270m_cpu"] and compose(compressed).distill.steps == 7
    assert "make compress" in (ROOT / "README.md").read_text() and "make test" in (ROOT / "README.md").read_text()


def test_fetch_plans_too() -> None:
    result = commands.run(["-m", "recipes.fetch", "experiment=smollm2_135m_cpu", "dry_run=true"])
    assert (result.returncode, result.stdout) == (0, "fetch: writes runs/assets\n"), result.stderr
