"""Megatron-Bridge at work, on the CPU: a process of its environment's Python that does a list of jobs.

python tool.py JOBS.json        `[["import", HF, CHECKPOINT], ...]`, the functions of `COMMANDS` and their arguments
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from compactlm_nemo.parallel.host import use_cpu

use_cpu()
torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]

from megatron.bridge import AutoBridge  # type: ignore[import-not-found]  # noqa: E402
from megatron.bridge.training import checkpointing, model_load_save  # type: ignore[import-not-found]  # noqa: E402


def import_checkpoint(hf: str, target: str) -> None:
    """Do what `AutoBridge.import_ckpt` does, on gloo instead of NCCL."""
    with model_load_save.temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_hf_pretrained(hf)
        model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, target, hf_tokenizer_path=hf)


def export_checkpoint(source: str, hf: str, target: str) -> None:
    AutoBridge.from_hf_pretrained(hf).export_ckpt(source, target, show_progress=False, strict=True)


def start_training(source: str, file: str) -> None:
    """Load a checkpoint as the trainer does that fine-tunes it (`pretrained_checkpoint`), and keep its weights."""
    settings, _ = model_load_save.load_model_config(str(Path(source) / "iter_0000000"))
    with model_load_save.temporary_distributed_context(backend="gloo"):
        settings.finalize()
        model = settings.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        checkpointing.load_checkpoint(_trainer(settings, source), model, None, None)
        weights = {name: tensor for name, tensor in model[0].named_parameters()}
        torch.save({name: tensor.detach().clone() for name, tensor in weights.items()}, file)


def _trainer(settings: Any, pretrained: str) -> Any:
    """Return the state of a trainer that has nothing of its own yet, as far as loading looks at it."""
    from megatron.bridge.training.config import CheckpointConfig  # type: ignore[import-not-found]
    from megatron.bridge.training.state import TrainState  # type: ignore[import-not-found]

    checkpoint = CheckpointConfig(pretrained_checkpoint=pretrained, load=f"{pretrained}/none")
    cfg = SimpleNamespace(
        model=settings, checkpoint=checkpoint, rng=None, optimizer=SimpleNamespace(use_distributed_optimizer=True),
        peft=None, logger=SimpleNamespace(log_progress=False), dist=SimpleNamespace(),
    )  # fmt: skip
    return SimpleNamespace(cfg=cfg, train_state=TrainState(), wandb_logger=None, mlflow_logger=None)


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_checkpoint,
    "export": export_checkpoint,
    "start": start_training,
    "page": lambda file: exec(Path(file).read_text(), {}),
}

if __name__ == "__main__":
    for command, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        COMMANDS[command](*arguments)
