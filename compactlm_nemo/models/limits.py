"""Sizes that an architecture forbids, and the one that makes another family of a model."""

from __future__ import annotations

from compactlm_nemo.models.dims import Dims


def needs_mistral(dims: Dims) -> bool:
    """Whether transformers' Llama refuses these sizes: heads must divide the hidden size, though they have a width.

    Its Mistral is the same computation without that rule, and without biases.
    """
    return dims.family == "llama" and dims.hidden_size % dims.num_heads > 0


def export_problem(dims: Dims) -> str | None:
    """Return why no Hugging Face folder can hold a model of these sizes; None when one can."""
    always = {"gemma3_text": True, "deepseek_v2": True}
    needs_multiple = (always | {"llama": dims.qkv_bias or dims.mlp_bias}).get(dims.family, False)
    if needs_multiple and dims.hidden_size % dims.num_heads:
        biases = " with biases" if dims.family == "llama" else ""
        return (
            f"search.hidden={dims.hidden_size} must be a multiple of search.heads={dims.num_heads} for a {dims.family}"
            f"{biases}, or transformers refuses to load it; change either."
        )
    if dims.dense_layers is not None and dims.shared_expert_ffn % dims.ffn_hidden_size:
        return (
            f"search.shared_expert_ffn={dims.shared_expert_ffn} must be a multiple of search.ffn="
            f"{dims.ffn_hidden_size} for {dims.family}, whose config counts in experts the one that sees every token; "
            "change either."
        )
    if dims.family == "phi3" and (dims.rope_scaling or {}).get("rope_type") == "longrope":
        # Its config counts the factors by heads as wide as hidden size / heads, whatever their size is.
        width, pairs = dims.hidden_size // dims.num_heads, int(dims.head_dim * dims.rotary_percent) // 2
        if int(width * dims.rotary_percent) // 2 != pairs:
            return (
                f"search.hidden={dims.hidden_size} / search.heads={dims.num_heads} must be {dims.head_dim}, the width "
                "of a head, for a phi3 with longrope, or transformers refuses to load it; change either."
            )
    return None


def cut_problem(teacher: Dims, student: Dims) -> str | None:
    """Return why the teacher's architecture forbids this student; None where it does not."""
    sizes = ("num_heads", "num_query_groups")
    if teacher.qk_norm_over_heads and any(getattr(student, size) != getattr(teacher, size) for size in sizes):
        return (
            f"search.heads={student.num_heads} and search.groups={student.num_query_groups} must be the teacher's "
            f"{teacher.num_heads} and {teacher.num_query_groups} for {teacher.family}: its norms of queries and keys "
            "run over all heads, and those that stay would change; leave both out."
        )
    groups, experts = teacher.expert_groups, student.num_experts
    least = max(2 * teacher.sigmoid_gates, -(-teacher.experts_per_token // teacher.groups_per_token)) * groups
    if groups > 1 and (experts % groups or experts < least):
        return (
            f"search.experts={experts} must be a multiple of {groups} and at least {least} for this {teacher.family}: "
            f"its experts are in {groups} groups, of which equally many stay of each; change it."
        )
    return None


def longest_text(dims: Dims) -> int:
    """Return the most tokens of a text whose keys may be kept: as long as they turn by the same frequencies."""
    if dims.rope_scaling is not None and dims.rope_scaling["rope_type"] == "longrope":
        return min(dims.max_position_embeddings, int(dims.rope_scaling["original_max_position_embeddings"]))
    return dims.max_position_embeddings
