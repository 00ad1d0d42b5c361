"""The integers (and few constants) that define an architecture, independent of any layout or file format."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compactlm_nemo.models.axes import AXES

MODEL = "model.json"
"""File of the architecture in an artifact that is a model."""
BY_LAYER = ("no_rope_layers", "local_layers", "dense_layers")
"""Fields of `Dims` with one value a layer, or None."""


@dataclass(frozen=True, kw_only=True)
class Dims:
    """One decoder-only transformer, dense or with experts in every layer but those of `dense_layers`.

    `num_heads` are query heads, `num_query_groups` key/value heads; `vocab_size` is unpadded.
    """

    family: str
    """Key of `families.FAMILIES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP, or of one expert."""
    num_heads: int
    num_query_groups: int
    head_dim: int
    """Width of a head: of queries, keys and values, or of values alone where there are latents."""
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    """`rope_type` and its numbers, as `models.rope.rope_of` gives them; None for frequencies as they are."""
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    """Whether channels 2i and 2i + 1 of a head turn together; else i and i + half of those that turn."""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    """Whether the two maps of the MLP, or of each expert, have a bias."""
    norm_before: bool = True
    """Whether attention and MLP read the stream behind a norm, and not the stream itself."""
    norm_after: bool = False
    """Whether what attention and MLP write goes through a norm before it is added to the stream."""
    qk_norm: bool = False
    """Whether queries and keys of each head are normed."""
    qk_norm_over_heads: bool = False
    """Whether there is one norm over the queries of all heads, and one over all keys."""
    gated_mlp: bool = True
    """True: activation(gate) * up. False: squared ReLU."""
    gelu: bool = False
    """Activation of a gated MLP: GELU by its tanh formula; else silu."""
    swiglu_limit: float | None = None
    """Of a gated MLP whose activation is ``(u + 1) g sigmoid(1.702 g)``: g = min(gate, limit), u = up within the limit
    on both sides. None: it is none of these."""
    layer_norm_1p: bool = False
    """True: LayerNorm with weight 1 + w and bias. False: RMSNorm."""
    rms_norm_1p: bool = False
    """Whether the weight of an RMSNorm is 1 + w, added in float32."""
    window: int | None = None
    """Sliding attention window in tokens, None for full attention."""
    attention_sinks: bool = False
    """Whether each query head has a logit of its own in the denominator of its softmax, with no key or value."""
    local_layers: list[bool] | None = None
    """For each layer whether it is local: it alone has the window. None where the layers are alike."""
    local_rope_theta: float | None = None
    """What local layers turn by, without scaling; None where they turn as the others do."""
    no_rope_layers: list[bool] | None = None
    """For each layer whether it has no rotary embedding; None for families whose layers all have it."""
    embedding_multiplier: float = 1.0
    """What a row of the embedding table is multiplied with where it enters the residual stream."""
    embedding_by_width: bool = False
    """Whether it is multiplied with ``sqrt(hidden_size)`` as well, rounded to the model's number format."""
    residual_multiplier: float = 1.0
    """What attention and MLP are multiplied with where they are added to the residual stream."""
    attention_multiplier: float | None = None
    """What products of queries and keys are multiplied with, None for ``1 / sqrt(head_dim)``."""
    logits_scaling: float = 1.0
    """What logits are divided by."""
    num_experts: int = 0
    """Experts of a layer, of which a router picks `experts_per_token`; 0 is a dense model."""
    experts_per_token: int = 0
    norm_topk: bool = False
    """Whether the gate weights of the picked experts are scaled to sum to 1; else they are what the softmax over all
    experts gives them."""
    router_bias: bool = False
    shared_expert_ffn: int = 0
    """Width of the expert that sees every token; 0 is none."""
    shared_expert_gate: bool = True
    """Whether that expert has a sigmoid gate of its own."""
    dense_layers: list[bool] | None = None
    """For each layer whether it has one MLP, `dense_ffn` wide, in place of experts; None where the layers are alike."""
    dense_ffn: int = 0
    sigmoid_gates: bool = False
    """Whether gates are sigmoids and a bias, which is not trained, is added where experts are chosen; else softmax."""
    expert_groups: int = 1
    """Groups of neighbouring experts: those of the `groups_per_token` best groups alone can be picked."""
    groups_per_token: int = 1
    gate_scale: float = 1.0
    """What the gates of picked experts are multiplied with."""
    kv_lora_rank: int = 0
    """Width of the latent that keys and values of all heads are made from; 0 is attention without latents."""
    q_lora_rank: int = 0
    """Width of the latent that queries are made from; 0 where they are made from the stream."""
    qk_nope_head_dim: int = 0
    """With latents, the channels of a query or key head that do not turn."""
    qk_rope_head_dim: int = 0
    """With latents, those that turn; the key's are one for all heads."""

    @property
    def norm_1p(self) -> bool:
        """Whether the weight of a norm is 1 + w."""
        return self.layer_norm_1p or self.rms_norm_1p

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return self.qk_rope_head_dim if self.kv_lora_rank else int(self.head_dim * self.rotary_percent)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    def is_dense(self, layer: int) -> bool:
        """Return whether a layer has one MLP and no experts."""
        return not self.num_experts or (self.dense_layers is not None and self.dense_layers[layer])

    def of_layer(self, layer: int) -> Dims:
        """Return the architecture whose layers are all as this one: a dense one where this layer is dense."""
        if self.dense_layers is None:
            return self
        if not self.dense_layers[layer]:
            return replace(self, dense_layers=None)
        without: dict[str, Any] = {"num_experts": 0, "experts_per_token": 0, "shared_expert_ffn": 0}
        return replace(self, dense_layers=None, ffn_hidden_size=self.dense_ffn, **without)

    def kinds(self) -> list[tuple[Dims, int]]:
        """Return what layers there are, each as `of_layer` says, and how many of each."""
        are_dense = [self.is_dense(layer) for layer in range(self.num_layers)]
        return [(self.of_layer(are_dense.index(kind)), are_dense.count(kind)) for kind in sorted({*are_dense})]

    def shape(self) -> dict[str, int]:
        """Return the size on every axis of `AXES`, by the axis's name."""
        return {name: getattr(self, axis.size) for name, axis in AXES.items()}

    def with_shape(self, **sizes: int) -> Dims:
        """Return the architecture with other sizes by axis of `AXES`: ``dims.with_shape(layers=16, hidden=3072)``.

        Which of its layers fewer layers are decides a plan (`keep_layers`); until then they count as the first ones.
        """
        kept = self.keep_layers(list(range(min(self.num_layers, sizes.get("layers", self.num_layers)))))
        changes: dict[str, Any] = {AXES[name].size: size for name, size in sizes.items()}
        return replace(kept, **changes)

    def keep_layers(self, layers: list[int]) -> Dims:
        """Return the architecture of these layers, 0-based: what is said of each layer goes with the layer."""
        by_layer = {name: values for name in BY_LAYER if (values := getattr(self, name)) is not None}
        kept: dict[str, Any] = {name: [values[layer] for layer in layers] for name, values in by_layer.items()}
        return replace(self, num_layers=len(layers), **kept)

    def padded_vocab(self, tp: int, multiple: int) -> int:
        """Return the smallest multiple of `tp * multiple` that holds the vocabulary."""
        unit = tp * multiple
        return -(-self.vocab_size // unit) * unit

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Dims:
        return Dims(**json.loads(path.read_text()))
