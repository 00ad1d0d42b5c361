"""The push stage: the exported folder goes to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.artifacts import MANIFEST, read_manifest
from compactlm_nemo.config.export import ExportedModel
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


JUDGED_AS = {ExportedModel.distilled: "distilled", ExportedModel.student: "pruned", ExportedModel.teacher: None}
"""Model that leaves -> how the gate's limits call it; the teacher is what they compare with."""


def push_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return why nothing can be pushed from here."""
    if config.export.push is None:
        return []
    from huggingface_hub import constants, get_token

    where = f"export.push={config.export.push}"
    judged = {limit.model.name for limit in config.gate.limits.values()}
    leaving = JUDGED_AS[config.export.of]
    if judged and leaving not in judged:
        way_out = f"give one model: {leaving}, or leave the gate out" if leaving else "leave the gate or the push out"
        return [f"{where} with export.of={config.export.of.name}: no limit of the gate is of that model; {way_out}."]
    if constants.HF_HUB_OFFLINE:
        return [f"{where} needs the Hub, and HF_HUB_OFFLINE is set; unset it, or leave export.push out."]
    if not get_token():
        return [f"{where} needs a token that may write there; set HF_TOKEN, or leave export.push out."]
    return []


def push_plan(config: Config) -> list[str]:
    """Return what would be pushed, as far as it is made."""
    folder = Path(config.run.dir) / "export"
    if not (folder / MANIFEST).is_file():
        return [f"push: would upload {folder}/hf to {config.export.push} once it is made"]
    sizes = {name: described["bytes"] for name, described in read_manifest(folder)["outputs"].items()}
    files = ", ".join(name.removeprefix("hf/") for name in sorted(sizes))
    return [f"push: would upload {len(sizes)} files, {sum(sizes.values()):,} bytes, to {config.export.push}: {files}"]


def push(run: Run, folder: Path) -> dict[str, Any]:
    """Upload the exported files, whose hashes were looked at before, in one commit: a reader sees all of it or nothing.

    A repository is made, private, where there is none. Weights of an earlier push that this one has not are removed in
    the same commit. What the Hub has by its hash is not sent again, so that a push that broke off goes on.
    """
    from compactlm_nemo.parallel.launch import main_rank_writes

    with main_rank_writes() as writes:
        return _upload(run) if writes else {}


def _upload(run: Run) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from compactlm_nemo.errors import ConfigError
    from compactlm_nemo.models.hub import answer_of, status_of, way_to_hub

    repository, exported, api = str(run.config.export.push), run.path("export"), HfApi()
    names = {name.removeprefix("hf/"): exported / name for name in sorted(read_manifest(exported)["outputs"])}
    try:
        with way_to_hub(api.endpoint):
            api.create_repo(repository, private=True, exist_ok=True)
            there = [name for name in api.list_repo_files(repository) if ".safetensors" in name and name not in names]
            changes: list[Any] = [CommitOperationAdd(name, path) for name, path in names.items()]
            changes += [CommitOperationDelete(name) for name in there]
            commit = api.create_commit(repository, changes, commit_message="A model by CompactLM-NeMo")
    except HfHubHTTPError as error:
        raise ConfigError(
            f"export.push={repository} was refused by {api.endpoint} ({status_of(error)}: {answer_of(error)}); give a "
            "token that may write there, or another name."
        ) from error
    return {"repository": repository, "commit": commit.oid, "files": len(names)}


STAGE = Stage(
    name="push",
    summary="`export/hf` -> a repository of the Hugging Face Hub, in one commit",
    reads=("export",),
    writes="push",
    settings=lambda config: {"export.push": config.export.push},
    is_wanted=lambda config: config.export.push is not None,
    is_gated=True,
    problems=push_problems,
    plan=push_plan,
    run=push,
)
