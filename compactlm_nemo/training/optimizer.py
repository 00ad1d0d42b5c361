"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.build import Chunks


def wrap_data_parallel(chunks: Chunks, *, shard_gradients: bool = True) -> list[Any]:
    """Megatron DDP around each chunk; gradients are summed in float32 and scaled by the token count.

    With `shard_gradients` each data-parallel rank ends with the part that its share of the optimizer needs, else with
    all of them.
    """
    ddps = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=shard_gradients, grad_reduce_in_fp32=True
            ),
            module=chunk,
            disable_bucketing=idx > 0,  # as Megatron does: only the first chunk's reduction can overlap
        )
        for idx, chunk in enumerate(chunks)
    ]
    for ddp, chunk in zip(ddps, chunks, strict=True):
        ddp.broadcast_params()
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return ddps


def build_optimizer(ddps: list[Any], cfg: DistillConfig) -> Any:
    """AdamW with float32 main weights, sharded over data-parallel ranks; one-dimensional weights do not decay."""
    dtype = ddps[0].module.config.params_dtype
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
        ddps,
    )


def gradient_norm(optimizer: Any) -> float:
    """The gradient's norm over all ranks; Megatron's own step would find it and move the weights at once."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


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
