"""Decoder layers compiled one by one, so that what stands between their matrix products runs in few kernels.

Each layer is compiled in place (`Module.compile`), which changes no parameter's name, at the first micro-batch of a
shape. Layers of equal shapes share their code, so that a model takes as long as one layer: a minute or so, kept on disk
by torch (`TORCHINDUCTOR_CACHE_DIR`). Where tensor parallelism communicates inside a layer, torch splits it there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch._dynamo import config as dynamo

from compactlm_nemo.models.build import ModelChunks

MOST_SHAPES = 64
"""Versions of one function that torch may keep: teacher and student, with and without gradient, in every part of a
layer. Beyond that it silently runs uncompiled, with its own limit of 8 in an ordinary training."""


def compile_layers(chunks: ModelChunks, backend: str = "inductor") -> None:
    """Let every layer of this rank's chunks be compiled when it first runs.

    Of a layer with experts the attention alone: every micro-batch sends its experts another number of tokens, which
    would be another shape. Hooks on modules inside a layer must be there before it first runs; they may end a graph.
    """
    dynamo.recompile_limit = MOST_SHAPES
    for layer in chunks.layers():
        part = layer.self_attention if chunks.dims.num_experts else layer
        part.compile(dynamic=False, backend=backend)


def compiling_nothing() -> AbstractContextManager[None]:
    """Let compiled layers run as they are inside the block on shapes that they have not seen, such as a last batch."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("eager_on_recompile")
    return stance
