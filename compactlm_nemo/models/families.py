"""One table a family: what a Hugging Face config means, and which HF tensors make up a Megatron parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.config_keys import known_keys, refuse_unknown_keys
from compactlm_nemo.models.config_values import (
    LAYER_TYPES,
    count_key,
    experts_of,
    local_layers_of,
    merged_experts_of,
    multipliers_of,
    no_rope_layers_of,
    query_scale_of,
    refuse_other_than_whole_sizes,
    refuse_other_value,
)
from compactlm_nemo.models.deepseek import LATENT_NAMES, deepseek_values, dims_of_deepseek
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.limits import export_problem, needs_mistral
from compactlm_nemo.models.rope import rope_of, rope_of_kinds

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
"""Megatron's names of the two matrices over the vocabulary."""


NORMS_BEFORE = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
AFTER_ATTENTION, AFTER_MLP = "self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"
"""Names of the norms behind attention and MLP, Megatron-Bridge's."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one Hugging Face architecture apart from the common decoder."""

    activation: str
    """Required value of `activation_key`."""
    activation_key: str = "hidden_act"
    gated_mlp: bool = True
    layer_norm_1p: bool = False
    rms_norm_1p: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    qkv_bias: bool | None = None
    """Fixed by the architecture, or None when `attention_bias` decides."""
    proj_bias: bool = True
    """Whether `attention_bias` means the output projection too."""
    mlp_bias: bool = False
    """Whether the architecture has the setting `mlp_bias`; the others have no such bias."""
    partial_rotary: bool = False
    """Whether the architecture can rotate only a part of each head."""
    rotary_interleaved: bool = False
    norm_eps: str = "rms_norm_eps"
    """Config key of the norm's epsilon."""
    window: bool = False
    """Whether `sliding_window` applies to all layers by itself (Mistral): a query sees `window` tokens up to its own.
    Elsewhere `sliding_window` means nothing without `use_sliding_window`."""
    skips_rope: bool = False
    """Whether some layers have no rotary embedding: `no_rope_layers`, or every `no_rope_layer_interval`-th."""
    local_layers: int | None = None
    """Which layers are local is what `layer_types` says, and these alone have the window; without it all but every
    `local_layers`-th are. None: layers are alike."""
    local_theta: bool = True
    """Whether local layers turn by a theta of their own, without scaling."""
    sinks: bool = False
    """Whether each query head has a logit of its own in the denominator of its softmax."""
    embedding_by_width: bool = False
    query_scalar: bool = False
    """Whether products of queries and keys are divided by the root of `query_pre_attn_scalar`."""
    multipliers: bool = False
    """Whether the config has the multipliers of `_MULTIPLIERS`."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further config keys of this family with the only values we support."""
    ffn: str = "intermediate_size"
    """Config key of the MLP's width, which is that of one expert where there are experts."""
    experts: bool = False
    """Whether every layer has experts instead of one MLP."""
    norm_topk: bool | None = None
    """Fixed by the architecture, or None when `norm_topk_prob` decides."""
    latents: bool = False
    """Whether attention is multi-head latent attention, the experts' shared one has no gate, gates are scaled and
    experts are in groups, and the first `first_k_dense_replace` layers have one MLP: what DeepSeek's families share."""
    sigmoid_gates: bool = False
    merged_experts: bool = False
    """Whether router and experts have biases, a clamped activation, and one tensor for all experts of a layer."""
    shared_expert: str = "shared_expert"
    """Tensor names: the expert that sees every token."""
    mlp: str = "mlp"
    """Tensor names: the module of MLP or experts in a layer."""
    router: str = "gate"
    norms: Mapping[str, str] = field(default_factory=NORMS_BEFORE.copy)
    """Tensor names: our norm of a layer -> theirs. Which norms there are decides what they are."""
    fc1: tuple[str, ...] = ("gate_proj", "up_proj")
    """Tensor names: the matrices before the activation, or the one that holds both."""
    fc2: str = "down_proj"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Tensor names: the three projections, or the one that holds all of them."""
    own_code: str | None = None
    """What `auto_map` names in folders whose code became transformers' own class."""


_NO_DENSE_LAYERS: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}
_DEEPSEEK: dict[str, Any] = {
    "experts": True, "ffn": "moe_intermediate_size",
    "shared_expert": "shared_experts",
}  # fmt: skip
_PLAIN_DEEPSEEK: dict[str, Any] = {"attention_bias": False, "moe_layer_freq": 1}

FAMILIES: dict[str, Family] = {
    "llama": Family(activation="silu", mlp_bias=True),
    "mistral": Family(activation="silu", qkv_bias=False, window=True),
    "qwen2": Family(activation="silu", qkv_bias=True, also={"use_sliding_window": False}),
    "qwen3": Family(activation="silu", qk_norm=True, also={"use_sliding_window": False}),
    "smollm3": Family(activation="silu", mlp_bias=True, skips_rope=True, also={"use_sliding_window": False}),
    "nemotron": Family(
        activation="relu2", gated_mlp=False, layer_norm_1p=True, norm_eps="norm_eps", mlp_bias=True,
        partial_rotary=True, fc1=("up_proj",),
    ),
    "phi3": Family(
        activation="silu", qkv_bias=False, window=True, partial_rotary=True, qkv=("qkv_proj",), fc1=("gate_up_proj",),
        own_code="modeling_phi3.Phi3ForCausalLM",
    ),
    "granite": Family(activation="silu", mlp_bias=True, multipliers=True),
    "olmo2": Family(
        activation="silu", qk_norm_over_heads=True,
        norms={AFTER_ATTENTION: "post_attention_layernorm", AFTER_MLP: "post_feedforward_layernorm"},
    ),
    "gemma3_text": Family(
        activation="gelu_pytorch_tanh", activation_key="hidden_activation", rms_norm_1p=True, qk_norm=True,
        local_layers=6, embedding_by_width=True, query_scalar=True,
        norms={
            "input_layernorm": "input_layernorm", AFTER_ATTENTION: "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm", AFTER_MLP: "post_feedforward_layernorm",
        },
        also={
            "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
        },
    ),
    "glm": Family(
        activation="silu", proj_bias=False, partial_rotary=True, rotary_interleaved=True, fc1=("gate_up_proj",)
    ),
    "glm4": Family(
        activation="silu", proj_bias=False, partial_rotary=True, rotary_interleaved=True, fc1=("gate_up_proj",),
        norms=NORMS_BEFORE | {AFTER_ATTENTION: "post_self_attn_layernorm", AFTER_MLP: "post_mlp_layernorm"},
    ),
    "mixtral": Family(
        activation="silu", qkv_bias=False, window=True, experts=True, norm_topk=True, mlp="block_sparse_moe",
        fc1=("w1", "w3"), fc2="w2",
    ),
    "qwen2_moe": Family(
        activation="silu", qkv_bias=True, experts=True, ffn="moe_intermediate_size",
        also={"use_sliding_window": False, "qkv_bias": True, **_NO_DENSE_LAYERS},
    ),
    "qwen3_moe": Family(
        activation="silu", qk_norm=True, experts=True, ffn="moe_intermediate_size",
        also={"use_sliding_window": False, **_NO_DENSE_LAYERS},
    ),
    "gpt_oss": Family(
        activation="silu", local_layers=2, local_theta=False, sinks=True, experts=True, norm_topk=True,
        merged_experts=True, router="router", fc1=("gate_up_proj",), also={"swiglu_alpha": 1.702},
    ),
    "deepseek_v2": Family(
        activation="silu", qkv_bias=False, latents=True, **_DEEPSEEK,
        also=_PLAIN_DEEPSEEK | {"mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
        norm_topk=False, own_code="modeling_deepseek.DeepseekV2ForCausalLM",
    ),
    "deepseek_v3": Family(
        activation="silu", qkv_bias=False, latents=True, sigmoid_gates=True, **_DEEPSEEK,
        also=_PLAIN_DEEPSEEK | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        own_code="modeling_deepseek.DeepseekV3ForCausalLM",
    ),
}  # fmt: skip


def dims_of(config: Any) -> Dims:
    """Return the architecture of a transformers config; a CheckpointError names the first thing we cannot represent."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={kind} is not supported; use one of {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    given = config.to_diff_dict()
    known = known_keys(
        experts=family.experts, local_layers=family.local_layers is not None, skips_rope=family.skips_rope,
        multipliers=family.multipliers, latents=family.latents, merged_experts=family.merged_experts,
    )  # fmt: skip
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    known |= {"auto_map"} if own_code is not None and own_code.split("--")[-1] == family.own_code else set()
    unknown = {key: value for key, value in given.items() if key not in known and value not in (None, False)}
    refuse_unknown_keys(unknown, kind)
    has_kinds = family.local_layers is not None
    counts = (count_key(config), "num_experts_per_tok") if family.experts else ()
    refuse_other_than_whole_sizes(config, (family.ffn, *counts))
    refuse_other_value(kind, family.activation_key, getattr(config, family.activation_key), family.activation)
    for key, value in family.also.items():
        refuse_other_value(kind, key, getattr(config, key, value), value)
    window = getattr(config, "sliding_window", None) if family.window or has_kinds else None
    for layer_type in [] if has_kinds else getattr(config, "layer_types", None) or []:
        refuse_other_value(kind, "layer_types", layer_type, "full_attention" if window is None else "sliding_attention")
    attention_bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = family.mlp_bias and bool(getattr(config, "mlp_bias", False))
    rope = rope_of_kinds(config) if has_kinds and family.local_theta else rope_of(config)
    if not family.partial_rotary:
        refuse_other_value(kind, "partial_rotary_factor", rope["rotary_percent"], 1.0)
    fields: dict[str, Any] = dict(
        family=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=getattr(config, family.ffn),
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=getattr(config, family.norm_eps),
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        proj_bias=attention_bias and family.qkv_bias is None and family.proj_bias,
        mlp_bias=mlp_bias or family.merged_experts,
        norm_before="input_layernorm" in family.norms,
        norm_after=AFTER_ATTENTION in family.norms,
        qk_norm=family.qk_norm,
        qk_norm_over_heads=family.qk_norm_over_heads,
        gated_mlp=family.gated_mlp,
        gelu=family.activation.startswith("gelu"),
        layer_norm_1p=family.layer_norm_1p,
        rms_norm_1p=family.rms_norm_1p,
        window=window,
        no_rope_layers=no_rope_layers_of(config) if family.skips_rope else None,
        local_layers=local_layers_of(config, family.local_layers) if family.local_layers else None,
        attention_sinks=family.sinks,
        rotary_interleaved=family.rotary_interleaved,
        embedding_by_width=family.embedding_by_width,
        **rope,
        **(query_scale_of(config) if family.query_scalar else {}),
        **(multipliers_of(config) if family.multipliers else {}),
        **(experts_of(config, kind, family.norm_topk) if family.experts else {}),
        **(merged_experts_of(config) if family.merged_experts else {}),
    )
    if family.latents:
        fields |= dims_of_deepseek(config, sigmoid=family.sigmoid_gates)
    return Dims(**fields)


def resized(config: Any, dims: Dims) -> Any:
    """Return a copy of a transformers config with the sizes of `dims`.

    Raises:
        CheckpointError: no config of this family can have them (`export_problem`).
    """
    if problem := export_problem(dims):
        raise CheckpointError(problem)
    values = config.to_dict()
    for key in ("auto_map", "quantization_config"):  # of code that does not travel, and of weights as they were
        values.pop(key, None)
    values.update(
        num_hidden_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_query_groups,
        head_dim=dims.head_dim,
    )
    values[FAMILIES[dims.family].ffn] = dims.ffn_hidden_size
    if dims.num_experts:
        key = next((name for name in ("n_routed_experts", "num_local_experts") if name in values), "num_experts")
        values[key] = dims.num_experts
        for key in {"num_experts_per_tok", "experts_per_token"} & values.keys():
            values[key] = dims.experts_per_token
    if FAMILIES[dims.family].latents:
        values |= deepseek_values(dims)
    elif dims.shared_expert_ffn:
        values["shared_expert_intermediate_size"] = dims.shared_expert_ffn
    if FAMILIES[dims.family].skips_rope:
        values["no_rope_layers"] = [int(not without) for without in dims.no_rope_layers or []]
    if dims.local_layers is not None:
        values["layer_types"] = [LAYER_TYPES[local] for local in dims.local_layers]
    elif values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: dims.num_layers]
    if "max_window_layers" in values:
        values["max_window_layers"] = dims.num_layers
    if not needs_mistral(dims):
        return type(config).from_dict(values)
    from transformers import MistralConfig

    names = {"mlp_bias", "attention_bias", "pretraining_tp", "model_type", "architectures"}
    fields = {name: value for name, value in values.items() if name not in names}
    return MistralConfig(**fields, sliding_window=None, architectures=["MistralForCausalLM"])


def hf_names(name: str, dims: Dims) -> list[str]:
    """Return HF tensors that, put together along dim 0, are the Megatron parameter `name`; qkv's go to `merge_qkv`.

    Layer and expert numbers are global and 0-based.
    """
    if name == EMBEDDING:
        return ["model.embed_tokens.weight"]
    if name == OUTPUT_LAYER:
        return ["lm_head.weight"]
    if name.startswith("decoder.final_layernorm."):
        return ["model.norm." + name.rsplit(".", 1)[1]]
    family = FAMILIES[dims.family]
    matrices = {"linear_fc1": family.fc1, "linear_fc2": [family.fc2]}
    _, _, layer, *middle, kind = name.split(".")
    if kind == "expert_bias":
        return [f"model.layers.{layer}.{family.mlp}.gate.e_score_correction_bias"]
    if kind == "softmax_offset":
        return [f"model.layers.{layer}.self_attn.sinks"]
    if kind == "gate_weight":
        return [f"model.layers.{layer}.{family.mlp}.shared_expert_gate.weight"]
    if is_merged(name, dims):
        (matrix,), suffix = matrices[middle[-1]], "" if kind == "weight" else f"_{kind}"
        return [f"model.layers.{layer}.{family.mlp}.experts.{matrix}{suffix}"]
    if middle[-1] in matrices:  # of an MLP, of one expert, or of the expert that sees every token
        where = ".".join(middle[:-1]).replace("mlp", family.mlp, 1)
        where = where.replace("experts.local_experts.", "experts.").replace("shared_experts", family.shared_expert)
        return [f"model.layers.{layer}.{where}.{matrix}.{kind}" for matrix in matrices[middle[-1]]]
    parts = {
        "self_attention.linear_qkv": [f"self_attn.{projection}" for projection in family.qkv],
        "self_attention.linear_proj": ["self_attn.o_proj"],
        "self_attention.q_layernorm": ["self_attn.q_norm"],
        "self_attention.k_layernorm": ["self_attn.k_norm"],
        "self_attention.query_norm": ["self_attn.q_norm"],
        "self_attention.key_norm": ["self_attn.k_norm"],
        "mlp.router": [f"{family.mlp}.{family.router}"],
        **(LATENT_NAMES if family.latents else {}),
        **{norm: [theirs] for norm, theirs in family.norms.items()},
    }[".".join(middle)]
    return [f"model.layers.{layer}.{part}.{kind}" for part in parts]


def is_merged(name: str, dims: Dims) -> bool:
    """Return whether a parameter is that of one expert, and its Hugging Face tensor that of all (`merged_experts`)."""
    return FAMILIES[dims.family].merged_experts and ".local_experts." in name


def hf_shapes(name: str, wanted: tuple[int, ...], dims: Dims) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors of `hf_names`; `wanted` is the shape of the whole Megatron parameter."""
    parts = len(hf_names(name, dims))
    if is_merged(name, dims):
        return [(dims.num_experts, *reversed(wanted))]
    if "linear_qkv" in name and parts > 1:
        rows = [heads * dims.head_dim for heads in (dims.num_heads, dims.num_query_groups, dims.num_query_groups)]
    else:
        rows = [wanted[0] // parts] * parts
    return [(count, *wanted[1:]) for count in rows]
