"""Which kernels attention runs, forward and backward, as `python -m tests.gpu.attention OUT.json`, on one device."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.build import build_model
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import positions_of
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh
from tests.support.attention_kernels import AttentionKernels

DIMS = Dims(
    family="llama", num_layers=1, hidden_size=128, ffn_hidden_size=128, num_heads=4, num_query_groups=2, head_dim=64,
    vocab_size=128, max_position_embeddings=512, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
END = 2
"""Token at which a document begins."""


class Case(NamedTuple):
    """A model with grouped queries, and what its attention is asked for."""

    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    has_documents: bool = False
    has_sinks: bool = False


CASES = {
    "causal": Case(),
    "window": Case(window=64),
    "documents": Case(has_documents=True),
    "sinks": Case(has_sinks=True),
    "sinks and window": Case(window=64, has_sinks=True),
    "float32": Case(torch.float32),
    "float32 with documents": Case(torch.float32, has_documents=True),
}


def operators(case: Case, mesh: Mesh) -> list[str]:
    """Names of what one layer runs."""
    dims = replace(DIMS, window=case.window, attention_sinks=case.has_sinks)
    (chunk,) = build_model(dims, mesh, dtype=case.dtype, vocab_multiple=128)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.02)
    chunk.document_end = END if case.has_documents else None
    tokens_BS = (torch.arange(512, device=device()).view(2, 256) * 7) % DIMS.vocab_size
    with AttentionKernels() as kernels:
        chunk.train()(tokens_BS, positions_of(tokens_BS), None).sum().backward()
    return sorted(kernels.seen)


def main() -> None:
    with launched(ParallelConfig(), seed=1) as mesh:
        found = {name: operators(case, mesh) for name, case in CASES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
