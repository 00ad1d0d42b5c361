"""Taylor importance in every layout against the definition: transformers' models and autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.distill.linear_kd import linear_ce_sum
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.importance.taylor import taylor_scores
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.megatron import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.models.tiny import VOCAB, save_tiny
from tests.ranks import run_ranks

DENSE = ("llama", "llama_tied_llama3_rope", "nemotron", "nemotron_tied_biases", "llama_biases")
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe")
HEADS, GROUPS = 4, 2


def windows() -> Tensor:
    """Five samples: neither two data-parallel ranks nor micro-batches of two come out even."""
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(8))


def reference(model: Any) -> dict[str, Tensor]:
    """The definition by plain loops over the tensors of a Hugging Face model."""
    ids = windows()
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    is_centred = model.config.model_type == "nemotron"
    taylor = {}
    for name, p in model.named_parameters():
        weight = p + 1 if is_centred and "norm" in name and name.endswith("weight") else p
        taylor[name] = (weight * p.grad).abs().detach()
    hidden = taylor["model.embed_tokens.weight"].sum(0) + taylor.get("lm_head.weight", torch.zeros(1)).sum(0)
    hidden = hidden + taylor["model.norm.weight"] + taylor.get("model.norm.bias", 0)
    scores = {}
    for i in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in taylor.items() if name.startswith(prefix)}
        for name, x in own.items():
            is_reader = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight"))
            if is_reader or name.endswith(("gate_proj.weight", "gate.weight")):
                hidden = hidden + x.sum(0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                hidden = hidden + x.sum(1)
            elif "layernorm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):
                hidden = hidden + x
            elif name.endswith("gate_up_proj"):
                hidden = hidden + x.sum((0, 1))
            elif name.endswith("experts.down_proj"):
                hidden = hidden + x.sum((0, 2))
        scores |= {f"layers.{i}.{name}": x for name, x in layer_scores(own).items()}
    return scores | {"hidden": hidden}


def layer_scores(own: dict[str, Tensor]) -> dict[str, Tensor]:
    def rows(projection: str, count: int) -> Tensor:
        """Of `count` heads: their rows and biases."""
        total = own[f"self_attn.{projection}.weight"].sum(1) + own.get(f"self_attn.{projection}.bias", 0)
        return total.reshape(count, -1).sum(1)

    scores = {"heads": rows("q_proj", HEADS) + own["self_attn.o_proj.weight"].sum(0).reshape(HEADS, -1).sum(1)}
    keys_and_values = rows("k_proj", GROUPS) + rows("v_proj", GROUPS)
    scores["groups"] = scores["heads"].reshape(GROUPS, -1).sum(1) + keys_and_values
    for path, name in (("mlp.", "mlp"), ("mlp.shared_expert.", "shared_expert.mlp")):
        if f"{path}down_proj.weight" in own:
            first = [x for x in own if x.startswith((f"{path}gate_proj.", f"{path}up_proj."))]
            values = [own[x].sum(1) if x.endswith("weight") else own[x] for x in first]
            scores[name] = sum(values) + own[f"{path}down_proj.weight"].sum(0)
    if "mlp.experts.down_proj" in own:
        gate_up_EF, down_EF = own["mlp.experts.gate_up_proj"].sum(2), own["mlp.experts.down_proj"].sum(1)
        scores["experts"] = gate_up_EF.sum(1) + down_EF.sum(1)
        for e, (gate_up_F, down_F) in enumerate(zip(gate_up_EF, down_EF, strict=True)):
            scores[f"experts.{e}.mlp"] = gate_up_F.reshape(2, -1).sum(0) + down_F
    return scores


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("taylor")
    for case in DENSE + MIXED:
        torch.save(reference(save_tiny(case, root / case).double()), root / case / "taylor.pt")
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        dims, chunks = filled(root / case, mesh)
        ddps = wrap_data_parallel(chunks.train(), shard_gradients=False)

        def loss_sum(hidden_NH: Tensor, labels_N: Tensor, mask_N: Tensor, chunks=chunks, dims=dims) -> Tensor:
            return linear_ce_sum(
                hidden_NH, chunks.head_weight, labels_N, mask_N, chunk_tokens=7, vocab_size=dims.vocab_size,
                vocab_start=mesh.tp_rank * chunks.head_weight.shape[0], tp_group=mesh.tp_group,
            )  # fmt: skip

        done: list[int] = []
        for micro_batch in (3, 2):  # twice: the second must not see anything of the first
            got = taylor_scores(ddps, dims, mesh, windows(), loss_sum, micro_batch=micro_batch, progress=done.append)
        assert sum(done) == (10 if mesh.is_last_stage else 0)
        if rank > 0:
            assert not got
            continue
        want = torch.load(root / case / "taylor.pt")
        assert got.keys() == want.keys()
        for name, expected in want.items():
            assert got[name].dtype == torch.float32
            error = float((got[name].double() - expected).abs().max() / expected.max())
            assert got[name].shape == expected.shape and error < 1e-5, f"{case} {name}: off by {error}"


@pytest.mark.parametrize("layout", COMBINED)
def test_taylor_is_the_definition_in_every_layout(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, DENSE, root)


@pytest.mark.parametrize("layout", ["1", "tp2_sp", "cp2", *EXPERT_LAYOUTS])
def test_taylor_with_experts_is_the_definition(layout: str, root: Path, tmp_path: Path) -> None:
    ranks, fields = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    run_ranks(_matches, ranks, tmp_path, fields, MIXED, root)


def _is_refused(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of(pp=2)
    dims, chunks = filled(root / "llama", mesh)
    ddps = wrap_data_parallel(chunks, shard_gradients=False)
    with pytest.raises(NumericsError, match="taylor .* is NaN or infinite"):
        taylor_scores(
            ddps, dims, mesh, windows(), lambda hidden, *_: hidden.sum() * torch.nan, micro_batch=2, progress=print
        )


def test_a_gradient_that_is_not_finite_is_an_error_on_every_rank(root: Path, tmp_path: Path) -> None:
    run_ranks(_is_refused, 2, tmp_path, root)
