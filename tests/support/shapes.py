"""Architectures that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace

from compactlm_nemo.models.dims import Dims

NEMOTRON_15B = Dims(
    family="nemotron", num_layers=32, hidden_size=6144, ffn_hidden_size=24576, num_heads=48, num_query_groups=8,
    head_dim=128, vocab_size=256000, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=10000.0,
    gated_mlp=False, layer_norm_1p=True,
)  # fmt: skip


TINY = replace(
    NEMOTRON_15B, family="llama", num_layers=2, hidden_size=4, ffn_hidden_size=6, num_heads=4, num_query_groups=2,
    head_dim=2, vocab_size=10, gated_mlp=True, layer_norm_1p=False, tied_embeddings=True,
)  # fmt: skip
