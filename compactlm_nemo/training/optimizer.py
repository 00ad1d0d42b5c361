"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.build import ModelChunks


def wrap_data_parallel(chunks: ModelChunks, *, shard_gradients: bool = True, overlap: bool = False) -> list[Any]:
    """Megatron DDP around each chunk; gradients are summed in float32 and scaled by the token count.

    With `shard_gradients` each data-parallel rank ends with the part that its share of the optimizer needs, else with
    all of them. With `overlap` they are summed bucket by bucket while backward goes on, and `start_gathering` and
    `finish_gathering` enclose what may run while the new weights are on their way.
    """
    ddps = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=shard_gradients,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
            ),
            module=chunk,
            disable_bucketing=idx > 0,  # as Megatron does: only the first chunk's reduction can overlap
        )
        for idx, chunk in enumerate(chunks)
    ]
    for ddp, chunk in zip(ddps, chunks, strict=True):
        ddp.broadcast_params()
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if overlap:  # before the last micro-batch nothing may be summed
            no_sync = [each.no_sync for each in ddps]
            chunk.config.no_sync_func = no_sync if len(ddps) > 1 else no_sync[0]
    return ddps


def start_gathering(ddps: list[Any]) -> None:
    """After the optimizer's step: its new weights go to the other data-parallel ranks, if they overlap."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync()


def finish_gathering(ddps: list[Any]) -> None:
    """Wait for the weights, if they overlap. Megatron's own hooks do too, but none guards a head used by itself."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


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
            overlap_param_gather=ddps[0].ddp_config.overlap_param_gather,
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
