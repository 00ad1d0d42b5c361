"""What a stage is given: settings on a mesh, the artifacts that it declared, and progress that resumes."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.artifacts import atomic_write_text, damaged_seals, differences, read_manifest, remove_sealed
from compactlm_nemo.config.data import LossOn
from compactlm_nemo.config.model import Precision
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokenizer import end_of_text, window_start
from compactlm_nemo.data.windows import Corpus, heldout_documents, heldout_windows, validation_windows
from compactlm_nemo.errors import CheckpointError, ConfigError, NumericsError
from compactlm_nemo.evaluation.heldout import HeldoutText
from compactlm_nemo.evaluation.lm_loss import evaluate_lm_loss
from compactlm_nemo.importance.scores import load_scores
from compactlm_nemo.losses.vocabulary import chunk_tokens
from compactlm_nemo.models.build import ModelChunks, build_model
from compactlm_nemo.models.checkpoint import load_model, save_model
from compactlm_nemo.models.dims import MODEL, Dims
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.parallel.world import is_main_rank
from compactlm_nemo.progress import progress_bar
from compactlm_nemo.stages.stage import Stage

HF = "hf"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Settings on a mesh, for one stage."""

    config: Config
    mesh: Mesh
    stage: Stage

    def path(self, artifact: str) -> Path:
        """Return the folder of an artifact, which the stage must have declared."""
        if artifact not in (*self.stage.artifacts(self.config), self.stage.writes):
            raise ValueError(f"stage {self.stage.name} does not declare that it reads {artifact}; add it to `reads`.")
        return Path(self.config.run.dir) / artifact

    def fingerprint(self, artifact: str) -> str:
        """Return the fingerprint of a finished artifact."""
        fingerprint: str = read_manifest(self.path(artifact))["fingerprint"]
        return fingerprint

    @property
    def progress(self) -> Path:
        """Folder of the stage's unfinished work."""
        return Path(self.config.run.dir) / "progress" / self.stage.name

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.model.precision is Precision.bf16 else torch.float32

    @property
    def teaching_artifact(self) -> str:
        """Artifact whose model teaches."""
        return "corrected" if self.config.corrects_before else "teacher"

    def dims(self, artifact: str) -> Dims:
        """Return the architecture of an artifact's model."""
        return Dims.load(self.path(artifact) / MODEL)

    def build(self, dims: Dims) -> ModelChunks:
        """Return this rank's part of a model of this run, weights not yet meaningful."""
        vocab_multiple = self.config.model.vocab_multiple
        rows = dims.padded_vocab(self.mesh.tp_size, vocab_multiple) // self.mesh.tp_size
        memory_mib = self.config.distill.loss_memory_mib
        tokens = chunk_tokens(memory_mib, rows, dims.hidden_size, dtype=self.dtype, device=device())
        model = build_model(dims, self.mesh, dtype=self.dtype, vocab_multiple=vocab_multiple, chunk_tokens=tokens)
        if self.config.data.mask_documents:
            for chunk in model:
                chunk.document_end = self.document_end
        return model

    def load(self, artifact: str) -> ModelChunks:
        """Return an artifact's model on this run's mesh."""
        model = self.build(self.dims(artifact))
        load_model(self.path(artifact), model)
        return model

    def save(self, folder: Path, model: ModelChunks, *, if_not_finite: str) -> None:
        """Write a model as an artifact. Collective.

        Raises:
            NumericsError: a weight is NaN or infinite; `if_not_finite`, the way out, ends the message.
        """
        if is_main_rank():
            model.dims.save(folder / MODEL)
        save_model(folder, model, if_not_finite)

    def unit_scores(self) -> dict[str, torch.Tensor]:
        """Return the scores that decide the cut, of this run's teacher."""
        scores = load_scores(self.path("score"))
        if scores.metadata.get("model") != self.fingerprint("teacher"):
            raise CheckpointError(f"{self.path('score')} holds scores of another model; delete it and score again.")
        return scores.ranking(self.config.search.width, self.config.search.depth, self.config.search.experts_by)

    def open_progress(self, settings: dict[str, Any], *, are_independent: bool = False) -> Path:
        """Return the folder of unfinished work; refuse to continue work that was started with other settings.

        Work of which a file is damaged is dropped, which a warning tells; training checkpoints look after themselves.

        Args:
            are_independent: Of its files only the damaged ones are dropped.
        """
        path, wanted = self.progress / "settings.json", json.loads(json.dumps(settings))
        started = None
        with main_rank_writes() as writes:
            if writes:
                started = self._undamaged_progress(path, are_independent)
            if writes and started is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(path, json.dumps(wanted, sort_keys=True))
        if differing := differences(broadcast_object(wanted if started is None else started), wanted):
            raise ConfigError(
                f"{self.progress} holds unfinished work with another {differing[0]}; choose another run.dir or delete "
                f"{self.progress}."
            )
        return self.progress

    def _undamaged_progress(self, path: Path, are_independent: bool) -> dict[str, Any] | None:
        """Return the settings with which unfinished work was begun; None without such work.

        Damaged files of it are removed first, or all of it.
        """
        problem, started = "", None
        if self.progress.is_dir() and any(self.progress.iterdir()):
            try:
                started = json.loads(path.read_text())
                problem = "" if isinstance(started, dict) else f"{path} is damaged"
            except (OSError, ValueError) as error:
                problem = f"{path} is damaged or missing ({error})"
        if not problem and not are_independent:
            problem = next(iter(damaged_seals(self.progress).values()), "")
        if problem:
            _log.warning("%s; %s begins anew.", problem, self.stage.name)
            shutil.rmtree(self.progress)
            return None
        if are_independent:
            self.drop_damaged_files()
        return started

    def drop_damaged_files(self) -> None:
        """Remove those files of unfinished work that are damaged, and say so; the main rank calls this."""
        for path, what in damaged_seals(self.progress).items():
            _log.warning("%s; %s makes it anew.", what, self.stage.name)
            remove_sealed(path)

    def train_corpora(self) -> list[Corpus]:
        """Return token files, share and counted tokens of every corpus of the training blend."""
        return self._corpora({name: corpus.share for name, corpus in self.config.data.blend.items()})

    def calibration_corpora(self) -> list[Corpus]:
        """Return the same of calibration, which `score.data` may draw otherwise."""
        return self._corpora(self.config.calibration_shares)

    def _corpora(self, shares: dict[str, float]) -> list[Corpus]:
        loss_of = {name: corpus.loss or LossOn.answer for name, corpus in self.config.data.train.items()}
        return [
            Corpus(self.token_prefix(f"train.{name}"), share, loss_of[name], self.window_start)
            for name, share in shares.items()
        ]

    def heldout_windows(self, name: str, max_tokens: int) -> Tensor:
        """Return the first windows of a held-out corpus, `[n, L + 1]`, on this rank's device."""
        data = self.config.data
        return heldout_windows(
            self.token_prefix(f"heldout.{name}"),
            data.sequence_length,
            max_tokens,
            loss=data.heldout[name].loss or LossOn.answer,
            bos=self.window_start,
        ).to(device())

    def heldout_text(self, name: str, max_tokens: int) -> HeldoutText:
        """Return the first windows of a held-out corpus, and the document of every target in them."""
        windows_NT, data = self.heldout_windows(name, max_tokens), self.config.data
        documents_NS = heldout_documents(
            self.token_prefix(f"heldout.{name}"),
            data.sequence_length,
            len(windows_NT),
            document_end=self.document_end,
            loss=data.heldout[name].loss or LossOn.answer,
        )
        return HeldoutText(windows_NT, documents_NS)

    def token_prefix(self, corpus: str) -> Path:
        """Return where the tokens of a corpus are: its own Megatron files, or those of the tokenize stage.

        That stage writes Megatron files too where the vocabulary is trimmed, as their ids are of the whole one.
        """
        own = self.config.data.corpora()[corpus].prefix if self.config.model.vocab_texts is None else None
        return own or self.path("tokens") / corpus

    @property
    def document_end(self) -> int:
        """Token behind every document."""
        return end_of_text(self.path("teacher") / HF, self.config.data.document_end)

    @property
    def window_start(self) -> int | None:
        """Token that begins every window; None leaves windows as they are."""
        return window_start(self.path("teacher") / HF, self.config.data.bos)


def validation_loss(run: Run, model: ModelChunks, label: str) -> float:
    """Return the LM loss in nats on windows of the training text after the calibration samples. Collective."""
    config = run.config
    windows_NT = validation_windows(
        run.train_corpora(), config.score.samples, config.prune.samples, config.data.sequence_length, config.run.seed,
        calibration=run.calibration_corpora() if config.score.data else None,
    ).to(device())  # fmt: skip
    with progress_bar(f"validate {label}", len(windows_NT), config.data.sequence_length) as advance:
        result = evaluate_lm_loss(model, windows_NT, micro_batch=config.evaluate.micro_batch, progress=advance)
    return check_loss(result.loss_nats, label)


def check_loss(loss_nats: float, label: str) -> float:
    """Return a loss that becomes part of a result.

    Raises:
        NumericsError: it is NaN or infinite.
    """
    if not math.isfinite(loss_nats):
        raise NumericsError(f"the loss of the {label} is {loss_nats}; its weights or model.precision do not hold.")
    return loss_nats
