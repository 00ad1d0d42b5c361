"""The cost of an architecture is counted in exact integers: parameters, bytes, FLOPs, key/value cache."""

from __future__ import annotations

from collections.abc import Callable

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.config.search import SearchConfig
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.dims import Dims


def _norm_params(dims: Dims) -> int:
    """Return parameters of one norm over the hidden size; LayerNorm has a bias, RMSNorm none."""
    return dims.hidden_size * (2 if dims.layer_norm_1p else 1)


def _halves(dims: Dims) -> int:
    """Return matrices that fc1 holds: gate and up, or up alone."""
    return 2 if dims.gated_mlp else 1


def _latent_weights(dims: Dims) -> int:
    """Return weights that make latents, and the turned key that all heads share, from the stream."""
    return (dims.q_lora_rank + dims.kv_lora_rank + dims.qk_rope_head_dim) * dims.hidden_size


def _heads_weights(dims: Dims) -> int:
    """Return weights of the query, key, value and output projections of one layer that belong to heads."""
    if dims.kv_lora_rank:
        of_head = (dims.q_lora_rank or dims.hidden_size) * dims.qk_head_dim + dims.hidden_size * dims.head_dim
        return dims.num_heads * (of_head + dims.kv_lora_rank * (dims.qk_nope_head_dim + dims.head_dim))
    return 2 * (dims.num_heads + dims.num_query_groups) * dims.head_dim * dims.hidden_size


def _mlp_weights(dims: Dims, ffn: int) -> int:
    """Return weights of an MLP, or of one expert, of this width."""
    return (_halves(dims) + 1) * ffn * dims.hidden_size


def _expert_biases(dims: Dims) -> tuple[int, int]:
    """Return biases of one expert: those of fc1, which tensor parallelism splits, and those of fc2."""
    biased = dims.mlp_bias and dims.num_experts > 0
    return _halves(dims) * dims.ffn_hidden_size * biased, dims.hidden_size * biased


def _router_weights(dims: Dims) -> int:
    """Return weights that decide on a layer's experts: the router, and the gate of the expert that sees every token."""
    return (dims.num_experts + (dims.shared_expert_ffn > 0 and dims.shared_expert_gate)) * dims.hidden_size


def _sharded_layer_params(dims: Dims) -> int:
    """Return parameters of one layer that tensor parallelism splits, without those that expert parallelism spreads."""
    always = dims.shared_expert_ffn if dims.num_experts else dims.ffn_hidden_size
    weights = _heads_weights(dims) + _mlp_weights(dims, always)
    qkv_rows = (dims.num_heads + 2 * dims.num_query_groups) * dims.head_dim
    norms = (dims.num_heads + dims.num_query_groups) * dims.head_dim * dims.qk_norm_over_heads
    sinks = dims.num_heads * dims.attention_sinks
    fc1_biases = 0 if dims.num_experts else _halves(dims) * dims.ffn_hidden_size * dims.mlp_bias
    return weights + norms + sinks + qkv_rows * dims.qkv_bias + fc1_biases


def _replicated_layer_params(dims: Dims) -> int:
    """Return parameters of one layer that every tensor- and expert-parallel rank holds whole."""
    has_fc2_bias = dims.mlp_bias and not dims.num_experts
    biases = dims.hidden_size * (dims.proj_bias + has_fc2_bias) + dims.num_experts * dims.router_bias
    norms = 2 * (dims.norm_before + dims.norm_after) * _norm_params(dims)
    router = _router_weights(dims) + dims.num_experts * dims.sigmoid_gates
    latents = _latent_weights(dims) + dims.q_lora_rank + dims.kv_lora_rank  # and their norms
    return norms + 2 * dims.head_dim * dims.qk_norm + biases + router + latents


def embedding_params(dims: Dims) -> int:
    """Return ``V H``, twice that when the output layer has its own weight; V is unpadded."""
    return dims.vocab_size * dims.hidden_size * (1 if dims.tied_embeddings else 2)


def num_params(dims: Dims) -> int:
    """Return all parameters of the model, as the exported files hold them (no vocabulary padding, tied weight once).

    ``embeddings + layers * (qkv + proj + fc1 + fc2 + biases + 2 norms + query/key norms) + final norm``, where fc1 and
    fc2 are those of all experts and of the shared expert, and router and shared expert's gate come on top.
    """
    return _params_with(dims, dims.num_experts)


def non_embedding_params(dims: Dims) -> int:
    """Return all but embedding and output layer."""
    return num_params(dims) - embedding_params(dims)


def active_params(dims: Dims) -> int:
    """Return parameters that one token uses: all but those of the experts that its routers do not pick."""
    return _params_with(dims, dims.experts_per_token)


def _params_with(dims: Dims, experts: int) -> int:
    """Return parameters of the model with `experts` of the experts of each layer."""
    layers = 0
    for kind, count in dims.kinds():
        of_expert = _mlp_weights(kind, kind.ffn_hidden_size) + sum(_expert_biases(kind))
        of_experts = min(experts, kind.num_experts) * of_expert
        layers += count * (_sharded_layer_params(kind) + _replicated_layer_params(kind) + of_experts)
    return embedding_params(dims) + layers + _norm_params(dims)


def params_per_rank(dims: Dims, *, layout: ParallelConfig, chunk_layers: list[int], vocab_multiple: int) -> list[int]:
    """Return parameters that a rank of each pipeline stage holds; the vocabulary is padded to `tp * vocab_multiple`.

    `chunk_layers` are the layers of each model chunk in pipeline order (`models.layout.split_layers`). With tied
    embeddings and ``pp > 1`` the first and the last stage each hold a copy of the table.
    """
    tp, pp = layout.tp, layout.pp
    problems = [
        f"parallel.tp={tp} must divide {axis.size}={getattr(dims, axis.size)}"
        for axis in AXES.values()
        if axis.split_by_tp and getattr(dims, axis.size) % tp
    ]
    if dims.num_experts % layout.ep:
        problems.append(f"parallel.ep={layout.ep} must divide num_experts={dims.num_experts}")
    if problems:
        raise ConfigError("; ".join(problems) + "; choose another layout.")
    table = dims.padded_vocab(tp, vocab_multiple) // tp * dims.hidden_size

    def of_layer(layer: int) -> int:
        kind = dims.of_layer(layer)
        experts, (fc1_biases, fc2_biases) = kind.num_experts // layout.ep, _expert_biases(kind)
        split = _sharded_layer_params(kind) + experts * (_mlp_weights(kind, kind.ffn_hidden_size) + fc1_biases)
        return split // tp + _replicated_layer_params(kind) + experts * fc2_biases

    params = []
    starts = [sum(chunk_layers[:chunk]) for chunk in range(len(chunk_layers))]
    for stage in range(pp):
        first, last = stage == 0, stage == pp - 1
        layers = [
            layer
            for start, count in zip(starts[stage::pp], chunk_layers[stage::pp], strict=True)
            for layer in range(start, start + count)
        ]
        shared = dims.tied_embeddings and first  # the output layer reads the input table of this rank
        params.append(
            sum(map(of_layer, layers))
            + table * first
            + table * (last and not shared)
            + _norm_params(dims) * last  # final norm
        )
    return params


def flops_per_token_forward(dims: Dims, seq: int) -> int:
    """Return forward FLOPs of one token, averaged over a sequence of `seq` tokens (rounded down; a multiply-add is 2).

    ``2 * (weights of all linear layers and of the output layer) + layers * 4 * heads * head_dim * context``, with
    latents ``2 * (query's and value's width)`` in place of ``4 * head_dim``, and keys and values made from them; where
    context is the mean number of keys a causal query reads: ``(seq + 1) / 2``, less with a sliding window. Of the
    experts only those that a token is sent to count, and the router. Norms, softmax, activations and the embedding
    look-up are not counted.
    """
    if seq < 1:
        raise ConfigError(f"data.sequence_length={seq} must be > 0; try 512.")
    linear = 0
    for kind, count in dims.kinds():
        mlps = (kind.experts_per_token or 1) * _mlp_weights(kind, kind.ffn_hidden_size)
        mlps += _router_weights(kind) + _mlp_weights(kind, kind.shared_expert_ffn)
        linear += count * (_heads_weights(kind) + _latent_weights(kind) + mlps)
    keys = sum(count * _keys(seq, min(seq, window or seq)) for window, count in _windows(dims).items())
    attention = 2 * dims.num_heads * (dims.qk_head_dim + dims.head_dim) * keys // seq
    return 2 * (linear + dims.vocab_size * dims.hidden_size) + attention


def prompt_flops(dims: Dims, tokens: int) -> int:
    """Return forward FLOPs of a prompt of `tokens` tokens, of which the last alone has logits."""
    return tokens * flops_per_token_forward(dims, tokens) - (tokens - 1) * 2 * dims.vocab_size * dims.hidden_size


def answer_flops(dims: Dims, prompt: int, answer: int) -> int:
    """Return forward FLOPs of `answer` tokens that are generated one by one after a prompt."""
    whole = prompt + answer
    return whole * flops_per_token_forward(dims, whole) - prompt * flops_per_token_forward(dims, prompt)


def read_params(dims: Dims) -> int:
    """Return parameters that a decoding step reads: all but the rows of an embedding table of its own."""
    return num_params(dims) - dims.vocab_size * dims.hidden_size * (not dims.tied_embeddings)


def _windows(dims: Dims) -> dict[int | None, int]:
    """Return the layers that have each window, None for those that have none."""
    if dims.local_layers is None:
        return {dims.window: dims.num_layers}
    num_local = sum(dims.local_layers)
    return {dims.window: num_local} | {None: dims.num_layers - num_local}


def _keys(seq: int, window: int) -> int:
    """Return the keys that the queries of a sequence read in one layer, summed over the queries."""
    return window * (window + 1) // 2 + (seq - window) * window


def cached_tokens(dims: Dims, context: int) -> int:
    """Return the tokens whose keys and values a sequence of `context` tokens keeps, the mean over the layers."""
    return sum(count * min(context, window or context) for window, count in _windows(dims).items()) // dims.num_layers


def kv_cache_bytes_per_token(dims: Dims, bytes_per_value: int) -> int:
    """Return ``layers * 2 * groups * head_dim * bytes_per_value``: keys and values of one token in all layers.

    With latents that of keys and values and the turned key are kept, ``layers * (latent + turned) * bytes_per_value``.
    """
    if dims.kv_lora_rank:
        return dims.num_layers * (dims.kv_lora_rank + dims.qk_rope_head_dim) * bytes_per_value
    return dims.num_layers * 2 * dims.num_query_groups * dims.head_dim * bytes_per_value


def memory_bytes(dims: Dims, tokens: int, bytes_per_value: int) -> int:
    """Return the bytes of the weights, and of keys and values of `tokens` tokens."""
    return weight_bytes(dims, bytes_per_value) + tokens * kv_cache_bytes_per_token(dims, bytes_per_value)


def weight_bytes(dims: Dims, bytes_per_value: int) -> int:
    """Return bytes of the weights, ``num_params * bytes_per_value``."""
    return num_params(dims) * bytes_per_value


def counts(cfg: SearchConfig) -> dict[str, Callable[[Dims], int]]:
    """Map each budget of `search` to the count it limits, at the batch, context and bytes per value of `search`."""
    return {
        "params": num_params,
        "non_embedding_params": non_embedding_params,
        "active_params": active_params,
        "memory_bytes": lambda dims: memory_bytes(
            dims, cfg.batch * cached_tokens(dims, cfg.context), cfg.bytes_per_value
        ),
        "flops": lambda dims: flops_per_token_forward(dims, cfg.context),
    }
