"""What tests do on each rank: make the mesh, build a filled model, take its logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from compactlm_nemo.models.build import HiddenStateModel, build_model, fill
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.parallel.groups import Mesh, current_mesh
from compactlm_nemo.parallel.host import use_cpu
from compactlm_nemo.parallel.launch import start_mesh

VOCAB_MULTIPLE = 8
"""Pads the tiny vocabulary of 131 differently for TP 1 and TP 2."""


def mesh_of(tp: int, pp: int) -> Mesh:
    """Megatron on the CPU in this rank's process group."""
    use_cpu()
    start_mesh(tp, pp, seed=1)
    return current_mesh()


def filled(
    folder: Path, mesh: Mesh, *, dtype: torch.dtype = torch.float32, vocab_multiple: int = VOCAB_MULTIPLE
) -> tuple[Dims, HiddenStateModel]:
    """Architecture and Megatron model of a Hugging Face folder."""
    dims, source = open_hf(folder)
    model = build_model(dims, mesh, dtype=dtype, vocab_multiple=vocab_multiple)
    fill(model, dims, mesh, source, vocab_multiple)
    return dims, model


def whole_logits(model: HiddenStateModel, dims: Dims, mesh: Mesh, tokens_BS: Tensor) -> Tensor | None:
    """`[B, S, vocab]` on the ranks of the last stage, through the pipeline schedule; None on the others."""

    def visit(_: int, hidden_SBH: Tensor) -> Tensor:
        own = (hidden_SBH @ model.head_weight.T).transpose(0, 1).contiguous()
        parts = [torch.empty_like(own) for _ in range(mesh.tp_size)]
        dist.all_gather(parts, own, group=mesh.tp_group)
        return torch.cat(parts, dim=-1)[..., : dims.vocab_size]

    results = forward_each(model, [tokens_BS], visit)
    return results[0] if mesh.is_last_stage else None
