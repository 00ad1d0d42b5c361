"""What tests do on each rank: make the mesh, build a filled model, take its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.build import ModelChunks, build_model, fill
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.models.layout import gathered_positions
from compactlm_nemo.parallel.collectives import all_gather
from compactlm_nemo.parallel.host import use_cpu
from compactlm_nemo.parallel.launch import start_mesh
from compactlm_nemo.parallel.mesh import Mesh

VOCAB_MULTIPLE = 8
CHUNK_TOKENS = 7
"""Pads the tiny vocabulary of 131 differently for TP 1 and TP 2."""


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp1_3": (2, {"pp": 2, "pp_split": [1, 3]}),
    "vpp2": (2, {"pp": 2, "virtual_stages": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "tp2_sp_cp2": (4, {"tp": 2, "sequence_parallel": True, "cp": 2}),
}
"""Number of ranks and fields of ParallelConfig, for models of four layers."""


COMBINED = [name for name in LAYOUTS if name not in ("tp2", "pp2")]
"""Without what tp2_pp2 does as well."""


EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}),
    "ep2_dp4": (4, {"ep": 2}),
    "ep2_pp2": (4, {"ep": 2, "pp": 2}),
    "tp2_sp_ep2": (4, {"tp": 2, "sequence_parallel": True, "ep": 2}),
}
"""The same for models with experts, spread over ranks."""


def mesh_of(tp: int = 1, pp: int = 1, **layout: Any) -> Mesh:
    """Megatron on the CPU in this rank's process group; `layout` are further fields of ParallelConfig."""
    use_cpu()
    return start_mesh(ParallelConfig(tp=tp, pp=pp, **layout), seed=1)


def filled(
    folder: Path, mesh: Mesh, *, dtype: torch.dtype = torch.float32, vocab_multiple: int = VOCAB_MULTIPLE
) -> tuple[Dims, ModelChunks]:
    """Architecture and Megatron model of a Hugging Face folder, with logits of few tokens at once."""
    dims, source = open_hf(folder)
    model = build_model(dims, mesh, dtype=dtype, vocab_multiple=vocab_multiple, chunk_tokens=CHUNK_TOKENS)
    fill(model, source, vocab_multiple)
    return dims, model


def whole_logits(model: ModelChunks, dims: Dims, mesh: Mesh, tokens_BS: Tensor) -> Tensor | None:
    """`[B, S, vocab]` on the ranks of the last stage, through the pipeline schedule; None on the others."""

    def visit(_: int, hidden_SBH: Tensor) -> Tensor:
        own = (hidden_SBH @ model.head_weight.T).transpose(0, 1).contiguous()
        logits_BSV = all_gather(own, mesh.tp_group, dim=-1)[..., : dims.vocab_size]
        if mesh.cp_size == 1:
            return logits_BSV
        order = gathered_positions(own.shape[1], mesh.cp_size).argsort()
        return all_gather(logits_BSV, mesh.cp_group, dim=1)[:, order]

    results = forward_each(model, [tokens_BS], visit)
    return results[0] if mesh.is_last_stage else None
