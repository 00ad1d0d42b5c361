"""A configuration on a mesh: where its folders are, and the models and tokens in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compactlm_nemo.artifacts import atomic_write_text, differences, read_manifest
from compactlm_nemo.config.model import Precision
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokens import end_of_text
from compactlm_nemo.data.windows import validation_windows
from compactlm_nemo.errors import CheckpointError, ConfigError
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.scores import load_scores
from compactlm_nemo.losses.vocabulary import chunk_tokens
from compactlm_nemo.models.build import ModelChunks, build_model
from compactlm_nemo.models.checkpoint import load_model, save_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import is_main_rank, main_rank_writes
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.progress import progress_bar


def validation_loss(run: Run, model: ModelChunks, dims: Dims, label: str) -> float:
    """LM loss in nats on windows of the training text that come after the calibration samples. Collective."""
    config = run.config
    windows_NT = validation_windows(
        run.train_prefixes(), config.score.samples, config.prune.samples, config.data.sequence_length, config.run.seed
    ).to(device())
    with progress_bar(f"validate {label}", len(windows_NT), config.data.sequence_length) as advance:
        return evaluate_lm_loss(
            model,
            dims,
            run.mesh,
            windows_NT,
            micro_batch=config.evaluate.micro_batch,
            chunk_tokens=run.chunk_tokens(dims),
            progress=advance,
        ).loss_nats


MODEL = "model.json"


HF = "hf"


@dataclass(frozen=True)
class Run:
    """A configuration on a mesh."""

    config: Config
    mesh: Mesh

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.model.precision is Precision.bf16 else torch.float32

    @property
    def teacher(self) -> str:
        """The stage whose model teaches."""
        return "corrected" if self.config.corrects_before else "teacher"

    def dims(self, stage: str) -> Dims:
        return Dims.load(self.dir / stage / MODEL)

    def build(self, dims: Dims) -> ModelChunks:
        """This rank's part of a model of this run, weights not yet meaningful."""
        model = build_model(dims, self.mesh, dtype=self.dtype, vocab_multiple=self.config.model.vocab_multiple)
        if self.config.data.mask_documents:
            for chunk in model:
                chunk.document_end = end_of_text(self.dir / "teacher" / HF)
        return model

    def chunk_tokens(self, dims: Dims) -> int:
        """Tokens whose logits `distill.loss_memory_mib` has room for."""
        rows = dims.padded_vocab(self.mesh.tp_size, self.config.model.vocab_multiple) // self.mesh.tp_size
        return chunk_tokens(self.config.distill.loss_memory_mib, rows, dims.hidden_size)

    def load(self, stage: str) -> ModelChunks:
        """The model that a stage made, on this run's mesh."""
        model = self.build(self.dims(stage))
        load_model(self.dir / stage, model, self.mesh)
        return model

    def save(self, folder: Path, model: ModelChunks, dims: Dims) -> None:
        if is_main_rank():
            dims.save(folder / MODEL)
        save_model(folder, model, self.mesh)

    def ranking(self) -> dict[str, torch.Tensor]:
        """The scores that decide the cut, of this run's teacher."""
        scores, teacher = load_scores(self.dir / "score"), read_manifest(self.dir / "teacher")["fingerprint"]
        if scores.metadata.get("model") != teacher:
            raise CheckpointError(f"{self.dir / 'score'} holds scores of another model; delete it and score again.")
        return scores.ranking(self.config.search.width, self.config.search.depth)

    def train_prefixes(self) -> list[tuple[Path, float]]:
        return [(self.token_prefix(f"train.{name}"), corpus.share) for name, corpus in self.config.data.train.items()]

    def token_prefix(self, corpus: str) -> Path:
        """Where the tokens of a corpus are: its own Megatron files, or those the tokenize stage made."""
        configured = self.config.data.corpora()[corpus]
        return Path(configured.path) if configured.is_tokenised else self.dir / "tokens" / corpus


def open_progress(state: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue work in `state` that was started with other settings."""
    text = json.dumps(settings, sort_keys=True)
    with main_rank_writes() as writes:
        if writes and not (state / "settings.json").exists():
            state.mkdir(parents=True, exist_ok=True)
            atomic_write_text(state / "settings.json", text)
    old: dict[str, Any] = broadcast_object(json.loads((state / "settings.json").read_text()) if is_main_rank() else {})
    new = json.loads(text)
    if differing := differences(old, new):
        raise ConfigError(
            f"{state} holds unfinished work with another {differing[0]}; choose another run.dir or delete {state}."
        )
