"""What an architecture costs, in exact integers: parameters, bytes, FLOPs, key/value cache."""

from __future__ import annotations

from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims


def _norm_params(dims: Dims) -> int:
    """One norm over the hidden size; LayerNorm has a bias, RMSNorm none."""
    return dims.hidden_size * (2 if dims.layer_norm_1p else 1)


def _sharded_layer_params(dims: Dims) -> int:
    """Parameters of one layer that tensor parallelism splits."""
    h, d = dims.hidden_size, dims.head_dim
    qkv_rows = (dims.num_heads + 2 * dims.num_query_groups) * d
    fc1_rows = dims.ffn_hidden_size * (2 if dims.gated_mlp else 1)
    weights = qkv_rows * h + h * dims.num_heads * d + fc1_rows * h + h * dims.ffn_hidden_size
    return weights + qkv_rows * dims.qkv_bias + fc1_rows * dims.mlp_bias


def _replicated_layer_params(dims: Dims) -> int:
    """Parameters of one layer that every tensor-parallel rank holds whole."""
    biases = dims.hidden_size * (dims.proj_bias + dims.mlp_bias)
    return 2 * _norm_params(dims) + 2 * dims.head_dim * dims.qk_norm + biases


def embedding_params(dims: Dims) -> int:
    """``V H``, twice that when the output layer has its own weight; V is unpadded."""
    return dims.vocab_size * dims.hidden_size * (1 if dims.tied_embeddings else 2)


def num_params(dims: Dims) -> int:
    """All parameters of the model, as the exported files hold them (no vocabulary padding, tied weight once).

    ``embeddings + layers * (qkv + proj + fc1 + fc2 + biases + 2 norms + query/key norms) + final norm``.
    """
    layer = _sharded_layer_params(dims) + _replicated_layer_params(dims)
    return embedding_params(dims) + dims.num_layers * layer + _norm_params(dims)


def params_per_rank(dims: Dims, *, tp: int, pp: int, stage: int, vocab_multiple: int) -> int:
    """Parameters one rank of a pipeline stage (0-based) holds; the vocabulary is padded to `tp * vocab_multiple`.

    With tied embeddings and ``pp > 1`` the first and the last stage each hold a copy of the table.
    """
    problems = [
        f"parallel.tp={tp} must divide {name}={value}"
        for name, value in (
            ("num_heads", dims.num_heads),
            ("num_query_groups", dims.num_query_groups),
            ("ffn_hidden_size", dims.ffn_hidden_size),
        )
        if value % tp
    ]
    if dims.num_layers % pp:
        problems.append(f"parallel.pp={pp} must divide num_layers={dims.num_layers}")
    if not 0 <= stage < pp:
        problems.append(f"stage={stage} must be in [0, parallel.pp={pp})")
    if problems:
        raise ConfigError("; ".join(problems) + "; choose another layout.")
    table = dims.padded_vocab(tp, vocab_multiple) // tp * dims.hidden_size
    layer = _sharded_layer_params(dims) // tp + _replicated_layer_params(dims)
    first, last = stage == 0, stage == pp - 1
    shared = dims.tied_embeddings and first  # the output layer reads the input table of the same rank
    return (
        dims.num_layers // pp * layer
        + table * first
        + table * (last and not shared)
        + _norm_params(dims) * last  # final norm
    )


def flops_per_token_forward(dims: Dims, seq: int) -> int:
    """Forward FLOPs of one token, averaged over a sequence of `seq` tokens (rounded down; a multiply-add is 2).

    ``2 * (weights of all linear layers and of the output layer) + layers * 4 * heads * head_dim * context``, where
    context is the mean number of keys a causal query reads: ``(seq + 1) / 2``, less with a sliding window.
    Norms, softmax, activations and the embedding look-up are not counted.
    """
    if seq < 1:
        raise ConfigError(f"data.sequence_length={seq} must be > 0; try 512.")
    linear = _sharded_layer_params(dims)
    qkv_rows = (dims.num_heads + 2 * dims.num_query_groups) * dims.head_dim
    linear -= qkv_rows * dims.qkv_bias + dims.ffn_hidden_size * (2 if dims.gated_mlp else 1) * dims.mlp_bias
    window = min(seq, dims.window or seq)
    keys = window * (window + 1) // 2 + (seq - window) * window  # summed over the queries of the sequence
    attention = 4 * dims.num_heads * dims.head_dim * dims.num_layers * keys // seq
    return 2 * (dims.num_layers * linear + dims.vocab_size * dims.hidden_size) + attention


def kv_cache_bytes_per_token(dims: Dims, bytes_per_value: int) -> int:
    """``layers * 2 * groups * head_dim * bytes_per_value``: keys and values of one token in all layers."""
    return dims.num_layers * 2 * dims.num_query_groups * dims.head_dim * bytes_per_value


def weight_bytes(dims: Dims, bytes_per_value: int) -> int:
    """``num_params * bytes_per_value``."""
    return num_params(dims) * bytes_per_value
