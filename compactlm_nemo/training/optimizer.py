"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.models.build import ModelChunks, recompute_activations
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.training.fusions import (
    Fusion,
    available_fusions,
    fuse_gradient_accumulation,
    use_torch_fused_adam,
)


def wrap_data_parallel(chunks: ModelChunks, *, shard_gradients: bool = True, overlap: bool = False) -> ModelChunks:
    """Put Megatron's DDP around each chunk, which sums gradients in float32 and scales them by the token count.

    With `shard_gradients` each data-parallel rank ends with the gradients that its share of the optimizer needs, else
    with all gradients. With `overlap` gradients are summed bucket by bucket while backward goes on, and new weights may
    travel while other work runs between `start_gathering` and `finish_gathering`.
    """
    ddps = chunks.wrapped(
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
    )
    for ddp, chunk in zip(ddps, chunks, strict=True):
        ddp.broadcast_params()
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if overlap:  # before the last micro-batch nothing may be summed
            no_sync = [each.no_sync for each in ddps]
            chunk.config.no_sync_func = no_sync if len(ddps) > 1 else no_sync[0]
    return ddps


def start_gathering(ddps: list[Any]) -> None:
    """Send the optimizer's new weights to the other data-parallel ranks; with overlap only, else its step did so."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync()


def finish_gathering(ddps: list[Any]) -> None:
    """Wait for the new weights, with overlap only. Megatron's own hooks guard no head that is used by itself."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_optimizer(ddps: list[Any], cfg: DistillConfig) -> Any:
    """Make AdamW with float32 main weights, sharded over data-parallel ranks; one-dimensional weights do not decay."""
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


def build_schedule(optimizer: Any, cfg: DistillConfig) -> OptimizerParamScheduler:
    """Make the schedule: linear warm-up to `lr`, cosine to `min_lr`.

    It advances before the optimizer's step, so step k of n trains at position k + 1.
    """
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


class TrainableModel:
    """A model under training: its chunks in Megatron's DDP, the optimizer of its weights and their schedule.

    Args:
        chunks: This rank's part of the model.
        cfg: Optimizer and schedule.
        overlap: See `wrap_data_parallel`.
    """

    def __init__(self, chunks: ModelChunks, cfg: DistillConfig, *, overlap: bool = False) -> None:
        recompute_activations(chunks, cfg.recompute)
        self.clip_grad = cfg.clip_grad
        fusions = available_fusions(is_cuda=device().type == "cuda")
        self.ddps = wrap_data_parallel(chunks, overlap=overlap)
        self.optimizer = build_optimizer(self.ddps, cfg)
        if Fusion.gradient_accumulation in fusions:
            fuse_gradient_accumulation(self.ddps)
        if Fusion.torch_adam in fusions:
            use_torch_fused_adam(self.optimizer)
        self.schedule = build_schedule(self.optimizer, cfg)

    @property
    def lr(self) -> float:
        """Return the learning rate of the step under way."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        for ddp in self.ddps:
            ddp.train(mode)

    def advance_schedule(self) -> None:
        """Set the learning rate of the next step."""
        self.schedule.step(1)

    def gradient_norm(self) -> float:
        """Return the gradient's norm over all ranks, before clipping and before `update`.

        Megatron's own step would find it and move the weights at once.
        """
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self, grad_norm: float) -> None:
        """Move the weights against the gradients, clipped by what `gradient_norm` has returned."""
        for part in self.optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and self.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        start_gathering(self.ddps)

    def finish_gathering(self) -> None:
        """Wait until every rank has the new weights."""
        finish_gathering(self.ddps)
