"""The profile stage: speed, memory and size of the exported student where it is served, the teacher beside it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.export import ExportedModel, ExportFormat
from compactlm_nemo.config.fingerprint import result_settings
from compactlm_nemo.config.profile import Engine, ProfileConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.evaluation.speed import Served, Timed
    from compactlm_nemo.stages.context import Run

FILE = "profile.json"
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Number format in settings -> torch's name."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def with_engines(config: Config) -> Config:
    """Return the settings of `recipes.profile` by itself: transformers generates where no engine is named."""
    if config.profile.engines:
        return config
    return replace(config, profile=replace(config.profile, engines=[Engine.transformers]))


def prompt_text(config: Config) -> str | None:
    """Return the held-out text of the prompts, None where there is no text."""
    return config.profile.text or next(iter(config.data.heldout), None)


def profile_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return why nothing can be measured: what is exported, the text, the length, an engine that is not here."""
    cfg, problems = config.profile, []
    if not cfg.engines:
        return []
    names = [engine.name for engine in cfg.engines]
    if config.export.format is not ExportFormat.hf:
        problems.append(
            f"profile.engines={names} load a Hugging Face folder, not export.format={config.export.format.name}; use "
            "export.format=hf, or leave the engines out."
        )
    if config.export.of is ExportedModel.teacher:
        problems.append(
            f"profile.engines={names} compare a student with the teacher, and export.of=teacher exports none; use "
            "export.of=distilled, or leave the engines out."
        )
    if cfg.text is not None and cfg.text not in config.data.heldout:
        problems.append(f"profile.text={cfg.text} is none of data.heldout={[*config.data.heldout]}; name one of them.")
    length = cfg.prompt_tokens + cfg.new_tokens
    if models and length > models[0].max_position_embeddings:
        problems.append(
            f"profile.prompt_tokens={cfg.prompt_tokens} and profile.new_tokens={cfg.new_tokens} must be at most "
            f"max_position_embeddings={models[0].max_position_embeddings} together; lower one of them."
        )
    return problems if config.dry_run else problems + _engine_problems(config)  # a plan may be for another machine


def _engine_problems(config: Config) -> list[str]:
    """Return which engines are not installed here."""
    from importlib.util import find_spec

    from compactlm_nemo.evaluation import llama_cpp

    problems = []
    if Engine.vllm in config.profile.engines and find_spec("vllm") is None:
        problems.append("profile.engines=[vllm] needs vLLM, which is not installed here; install it, or leave it out.")
    if Engine.llama_cpp in config.profile.engines:
        problems += llama_cpp.problems(config.profile)
    return problems


def profile(run: Run, folder: Path) -> dict[str, Any]:
    """Write profile.json, and profile.md for people. The main rank measures, and the others wait."""
    from compactlm_nemo.parallel.launch import main_rank_writes

    with main_rank_writes() as writes:
        return _profile(run, folder) if writes else {}


def _profile(run: Run, folder: Path) -> dict[str, Any]:
    import shutil

    from compactlm_nemo.artifacts import atomic_write_text, write_json
    from compactlm_nemo.models.families import dims_of
    from compactlm_nemo.models.hf import read_config
    from compactlm_nemo.report.speed import speed_lines
    from compactlm_nemo.search.cost import num_params
    from compactlm_nemo.search.saving import expected_ratios
    from compactlm_nemo.stages.context import HF

    cfg, scratch = run.config.profile, folder / "scratch"
    exported_as, stored_dtype = _exported(run)
    dtype = stored_dtype if cfg.dtype is None else TORCH_NAMES[cfg.dtype.value]
    prompts = _prompts(run)
    folders = {"teacher": _teacher_folder(run, scratch, stored_dtype), "student": run.path("export") / HF}
    dims = {"teacher": run.dims("teacher"), "student": dims_of(read_config(folders["student"]))}
    expected = expected_ratios(dims["teacher"], dims["student"], prompt=cfg.prompt_tokens, answer=cfg.new_tokens)
    bench = _Bench(cfg, folders, prompts, cfg.threads or len(os.sched_getaffinity(0)), dtype, scratch)
    found = {
        "teacher": run.fingerprint("teacher"),
        "exported": exported_as,
        "text": prompt_text(run.config),
        "dtype": dtype,
        **{name: getattr(cfg, name) for name in ("prompt_tokens", "new_tokens", "repeats")},
        "models": {
            name: {"params": num_params(each), "weight_bytes": num_params(each) * BYTES[dtype]}
            for name, each in dims.items()
        },
        "expected": expected,
        "engines": [bench.measure(engine, expected) for engine in cfg.engines],
    }
    shutil.rmtree(scratch)
    write_json(folder / FILE, found)
    text = "\n".join(speed_lines(found)) + "\n"
    atomic_write_text(folder / "profile.md", text)
    print(text)
    return {"expected": expected, "engines": [engine.name for engine in cfg.engines]}


def _exported(run: Run) -> tuple[str, str]:
    """Return which model was exported, and torch's name of its number format.

    Raises:
        ConfigError: it is the teacher, or no Hugging Face folder.
    """
    from compactlm_nemo.artifacts import read_manifest
    from compactlm_nemo.errors import ConfigError

    manifest = read_manifest(run.path("export"))
    settings = manifest["settings"]
    if settings["export.of"] == ExportedModel.teacher.name or settings["export.format"] != ExportFormat.hf.name:
        raise ConfigError(
            f"{run.path('export')} was made with export.of={settings['export.of']} and "
            f"export.format={settings['export.format']}, and a profile compares a student's Hugging Face folder with "
            "the teacher's; delete it and export a student."
        )
    return settings["export.of"], manifest["results"]["dtype"]


def _teacher_folder(run: Run, scratch: Path, dtype: str) -> Path:
    """Export the teacher as the student was exported, for the time of the measurement."""
    import torch

    from compactlm_nemo.models.checkpoint import CheckpointSource
    from compactlm_nemo.models.hf import export_hf
    from compactlm_nemo.stages.context import HF

    dims, source = run.dims("teacher"), run.path("teacher")
    export_hf(source / HF, scratch / "teacher", dims, CheckpointSource(source, dims), getattr(torch, dtype))
    return scratch / "teacher"


def _prompts(run: Run) -> list[list[int]]:
    """Return the prompts, one after another from the start of the held-out text, each begun as the model was trained.

    Raises:
        DataError: the text has too few tokens.
    """
    from compactlm_nemo.config.data import LossOn
    from compactlm_nemo.data.windows import TokenStream
    from compactlm_nemo.errors import DataError

    cfg, name = run.config.profile, prompt_text(run.config)
    stream = TokenStream(run.token_prefix(f"heldout.{name}"), loss=LossOn.all, bos=run.window_start)
    if stream.num_windows(cfg.prompt_tokens) < cfg.prompts:
        raise DataError(
            f"profile.prompts={cfg.prompts} of {cfg.prompt_tokens} tokens are more than the {stream.num_tokens} tokens "
            f"of data.heldout.{name}; lower one of them, or name a longer text."
        )
    return [stream.window(i, cfg.prompt_tokens)[:-1].tolist() for i in range(cfg.prompts)]


@dataclass(frozen=True)
class _Bench:
    """What every engine is given."""

    cfg: ProfileConfig
    folders: dict[str, Path]
    """Model -> its Hugging Face folder."""
    prompts: list[list[int]]
    threads: int
    dtype: str
    scratch: Path

    def measure(self, engine: Engine, expected: dict[str, float]) -> dict[str, Any]:
        """Return the figures of both models with one engine."""
        from compactlm_nemo.evaluation.speed import summary, take_turns
        from compactlm_nemo.parallel.interruption import stop_if_asked
        from compactlm_nemo.parallel.world import launch_world_size
        from compactlm_nemo.progress import progress_bar

        cfg, models = self.cfg, dict[str, "Served"]()
        try:
            for name in self.folders:
                models[name] = self._served(engine, name)
            answers = len(models) * len(cfg.batches) * (cfg.repeats + 1)
            with progress_bar(f"profile with {engine.name}", answers, cfg.prompt_tokens + cfg.new_tokens) as advance:

                def done(count: int) -> None:
                    advance(count)
                    if launch_world_size() == 1:  # other ranks wait for the end of this stage
                        stop_if_asked("nothing of profile is kept")

                turns = take_turns(models, cfg.batches, cfg.repeats, done)
            figures = {
                name: {
                    "disk_bytes": model.disk_bytes,
                    "peak_bytes": model.peak_bytes(),
                    "batches": [summary(batch, timed) for batch, timed in turns[name].items()],
                }
                for name, model in models.items()
            }
            about = models["student"].about
        finally:
            for model in models.values():
                model.close()
        return {"engine": engine.name, **about, "models": figures, "ratios": _shares(turns, expected)}

    def _served(self, engine: Engine, name: str) -> Served:
        """Load one model with an engine."""
        from compactlm_nemo.evaluation import llama_cpp
        from compactlm_nemo.evaluation.speed import Child

        cfg, folder = self.cfg, self.folders[name]
        if engine is Engine.llama_cpp:
            file = llama_cpp.convert(cfg, folder, self.scratch / f"{name}.gguf", self.dtype)
            return llama_cpp.Bench(name, file, cfg, self.threads)
        return Child(
            name, engine.name, folder, self.prompts, cfg.new_tokens,
            dtype=self.dtype, threads=self.threads, largest_batch=max(cfg.batches),
        )  # fmt: skip


def _shares(turns: dict[str, dict[int, list[Timed]]], expected: dict[str, float]) -> list[dict[str, Any]]:
    """Return, for each batch and phase, the student's time over the teacher's and what share of the saving it is."""
    from compactlm_nemo.evaluation.speed import ratios
    from compactlm_nemo.search.saving import BOUND_BY, arrived

    rows: list[dict[str, Any]] = []
    for batch, timed in turns["teacher"].items():
        row: dict[str, Any] = {"batch": batch}
        for phase, spread in ratios(timed, turns["student"][batch]).items():
            shares = {bound: arrived(spread.median, expected[bound]) for bound in BOUND_BY[phase]}
            row[phase] = asdict(spread) | {"share_of_saving": shares}
        rows.append(row)
    return rows


STAGE = Stage(
    name="profile",
    summary="exported student and teacher -> `profile.json`: speed, memory and size where they are served",
    reads=("teacher", "tokens", "export"),
    writes="profile",
    settings=lambda config: {"profile": result_settings(config.profile) | {"text": prompt_text(config)}},
    is_wanted=lambda config: bool(config.profile.engines),
    problems=profile_problems,
    run=profile,
)
