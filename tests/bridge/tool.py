"""Megatron-Bridge at work: started by its own environment's Python, one command a process, everything on the CPU.

    python tool.py import HF CHECKPOINT          a Hugging Face folder becomes a checkpoint
    python tool.py export CHECKPOINT HF TARGET   a checkpoint becomes a Hugging Face folder, as the one in HF
    python tool.py start CHECKPOINT FILE         a training starts from it (`pretrained_checkpoint`), weights into FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compactlm_nemo.parallel.host import use_cpu

use_cpu()
torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.training import checkpointing, model_load_save  # noqa: E402


def import_checkpoint(hf: str, target: str) -> None:
    """What `AutoBridge.import_ckpt` does, on gloo instead of NCCL."""
    with model_load_save.temporary_distributed_context(backend="gloo"):
        bridge = AutoBridge.from_hf_pretrained(hf)
        model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, target, hf_tokenizer_path=hf if Path(hf, "tokenizer.json").exists() else None)


def export_checkpoint(source: str, hf: str, target: str) -> None:
    AutoBridge.from_hf_pretrained(hf).export_ckpt(source, target, show_progress=False, strict=True)


def start_training(source: str, file: str) -> None:
    """Load a checkpoint as Bridge's trainer does at the start of a fine-tuning, all keys of the model being asked for."""
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer

    settings = model_load_save.load_model_config(str(Path(source) / "iter_0000000"))[0]
    with model_load_save.temporary_distributed_context(backend="gloo"):
        settings.finalize()
        model = settings.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        state = _state(settings, CheckpointConfig(pretrained_checkpoint=source, load=source + "-none"), ConfigContainer)
        checkpointing.load_checkpoint(state, model, None, None)
        weights = {name: tensor for name, tensor in model[0].state_dict().items() if isinstance(tensor, torch.Tensor)}
        torch.save({name: tensor for name, tensor in weights.items() if "_extra_state" not in name}, file)


def _state(settings: Any, checkpoint: Any, container: Any) -> Any:
    from types import SimpleNamespace

    from megatron.bridge.training.state import TrainState

    checkpoint.ckpt_format, checkpoint.dist_ckpt_strictness = "torch_dist", "assume_ok_unexpected"
    cfg = SimpleNamespace(
        model=settings, checkpoint=checkpoint, rng=None, optimizer=SimpleNamespace(use_distributed_optimizer=True),
        peft=None, logger=SimpleNamespace(log_progress=False), dist=SimpleNamespace(),
    )  # fmt: skip
    return SimpleNamespace(cfg=cfg, train_state=TrainState(), wandb_logger=None, mlflow_logger=None)


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_checkpoint,
    "export": export_checkpoint,
    "start": start_training,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
