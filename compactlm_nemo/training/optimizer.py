"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from compactlm_nemo.config.schema import DistillConfig


def wrap_data_parallel(model: Any) -> Any:
    """Megatron DDP with the distributed optimizer; gradients are summed in float32 and scaled by the token count."""
    ddp = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        module=model,
    )
    ddp.broadcast_params()
    model.config.finalize_model_grads_func = finalize_model_grads
    return ddp


def build_optimizer(ddp: Any, cfg: DistillConfig) -> Any:
    """AdamW with float32 main weights, sharded over data-parallel ranks; one-dimensional weights do not decay."""
    dtype = ddp.module.config.params_dtype
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.beta1,
            adam_beta2=cfg.beta2,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            clip_grad=cfg.clip_grad,
        ),
        [ddp],
    )


def build_schedule(optimizer: Any, cfg: DistillConfig) -> OptimizerParamScheduler:
    """Linear warm-up to `lr`, cosine to `min_lr`. Advance it before the step: step k of n trains at position k + 1."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.warmup_steps,
        lr_decay_steps=cfg.steps,
        lr_decay_style="cosine",
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=cfg.steps,
        wd_incr_style="constant",
    )
