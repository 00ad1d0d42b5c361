"""Models with experts: spread over ranks, saved and loaded elsewhere, routing, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.build import build_model, global_names
from compactlm_nemo.models.checkpoint import CheckpointSource, load_model, save_model
from compactlm_nemo.models.families import dims_of, resized
from compactlm_nemo.models.hf import export_hf, open_hf
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of, whole_logits
from tests.support.ranks import run_ranks
from tests.support.tiny_models import EXPERT_CASES, LATENT_CASES, save_tiny, tiny_config, tiny_model, tokens

MIXED = (*EXPERT_CASES, *LATENT_CASES)


@pytest.fixture(scope="module")
def hf_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case with the Hugging Face model and its logits."""
    root = tmp_path_factory.mktemp("hf")
    for case in MIXED:
        model = save_tiny(case, root / case)
        with torch.no_grad():
            torch.save(model(tokens()).logits, root / case / "logits.pt")
    return root


def _compare_and_save(rank: int, world: int, layout: dict[str, Any], root: Path, out: Path) -> None:
    mesh = mesh_of(**layout)
    mine = slice(mesh.dp_rank % 2, None, min(mesh.dp_size, 2))  # neighbours in expert parallelism see other samples
    for case in MIXED:
        dims, model = filled(root / case, mesh)
        got = whole_logits(model.eval(), dims, mesh, tokens()[mine])
        if got is not None:
            want = torch.load(root / case / "logits.pt")[mine]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4, msg=lambda m, case=case: f"{case}: {m}")
        save_model(out / case, model)


def _load_and_compare(rank: int, world: int, layout: dict[str, Any], root: Path, saved: Path) -> None:
    mesh = mesh_of(**layout)
    for case in MIXED:
        dims, want = filled(root / case, mesh)
        got = build_model(dims, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE)
        load_model(saved / case, got)
        for (name, a), b in zip(global_names(want), got.parameters(), strict=True):
            assert torch.equal(a, b), f"{case}: {name} differs after loading in {layout}"


@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    [("ep2", "pp2"), ("ep2_pp2", "tp2_sp_ep2"), ("tp2_sp_ep2", "ep2"), ("ep2_dp4", "1"), ("pp2", "ep2_pp2")],
)
def test_experts_on_several_ranks_are_the_model(saved_in: str, loaded_in: str, hf_root: Path, tmp_path: Path) -> None:
    layouts = LAYOUTS | EXPERT_LAYOUTS
    saved = tmp_path / "saved"
    run_ranks(_compare_and_save, layouts[saved_in][0], tmp_path, layouts[saved_in][1], hf_root, saved)
    run_ranks(_load_and_compare, layouts[loaded_in][0], tmp_path, layouts[loaded_in][1], hf_root, saved)
    for case in MIXED:
        dims, _ = open_hf(hf_root / case)
        target = tmp_path / "export" / case
        export_hf(hf_root / case, target, dims, CheckpointSource(saved / case, dims), torch.float32)
        want, got = load_file(hf_root / case / "model.safetensors"), load_file(target / "model.safetensors")
        assert want.keys() == got.keys(), case
        assert all(torch.equal(want[name], got[name]) for name in want), case


def _compare_in_bf16(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of(ep=2)
    for case in MIXED:
        dims, model = filled(root / case, mesh, dtype=torch.bfloat16)
        got = whole_logits(model.eval(), dims, mesh, tokens()[rank : rank + 1])
        assert got is not None
        want = torch.load(root / case / "logits.pt")[rank : rank + 1]
        distance = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
        # transformers' own bf16 is at 0.02, tokens whose expert changes by rounding at 0.3, another model at 1.
        assert distance.median() < 0.1, (case, distance)


def test_bf16_is_near(hf_root: Path, tmp_path: Path) -> None:
    run_ranks(_compare_in_bf16, 2, tmp_path, hf_root)


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_the_router_of_the_cases_decides_clearly_and_differently(case: str) -> None:
    """Else rounding could change the choice between implementations, or one expert could stand for all."""
    model = tiny_model(case)
    routed: list[tuple[Tensor, Tensor]] = []

    def remember(router: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        # From the weight: transformers 5.2 returns probabilities where later versions return logits.
        logits_NE = args[0].detach().flatten(0, -2) @ router.weight.detach().T
        if getattr(router, "bias", None) is not None:
            logits_NE = logits_NE + router.bias.detach()
        routed.append((logits_NE.sort(dim=-1, descending=True).values, output[2]))

    for layer in model.model.layers:
        getattr(layer.mlp, "gate" if hasattr(layer.mlp, "gate") else "router").register_forward_hook(remember)
    model(tokens())
    picked = model.config.num_experts_per_tok
    for logits_NE, chosen_NK in routed:
        assert (logits_NE[:, picked - 1] - logits_NE[:, picked]).min() > 1e-3
        assert len({frozenset(row) for row in chosen_NK.tolist()}) >= 3
    assert {expert for _, chosen_NK in routed for expert in chosen_NK.flatten().tolist()} == {0, 1, 2, 3}


def test_resized_config_has_other_experts() -> None:
    for case in EXPERT_CASES:
        config = tiny_config(case)
        changes = {"num_experts": 3, "shared_expert_ffn": 20} if case == "qwen2_moe" else {"num_experts": 3}
        small = replace(dims_of(config).with_shape(layers=3, hidden=32, ffn=8, heads=2), **changes)
        new = resized(config, small)
        assert dims_of(new) == small
        mlp = AutoModelForCausalLM.from_config(new).model.layers[2].mlp
        if config.model_type == "gpt_oss":
            assert (mlp.router.weight.shape, mlp.router.bias.shape) == ((3, 32), (3,))
            assert mlp.experts.gate_up_proj.shape == (3, 32, 2 * 8)
            continue
        assert mlp.gate.weight.shape == (3, 32)
        assert mlp.experts.gate_up_proj.shape == (3, 2 * 8, 32)
        if case == "qwen2_moe":
            assert mlp.shared_expert.down_proj.weight.shape == (32, 20)


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def _other_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    (folder / "config.json").write_text(json.dumps(config | {key: 5}))


@pytest.mark.parametrize(
    ("case", "spoil", "words"),
    [
        ("qwen3_moe", _config(mlp_only_layers=[1]), "mlp_only_layers=[1] is not supported for qwen3_moe"),
        ("qwen2_moe", _config(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported for qwen2_moe"),
        ("qwen2_moe", _config(qkv_bias=False), "qkv_bias=False is not supported for qwen2_moe"),
        ("qwen3_moe", _config(num_experts_per_tok=5), "num_experts_per_tok=5 must be in [1, 4]"),
        ("mixtral", _config(num_experts_per_tok=1), "num_experts_per_tok=1 with gate weights scaled"),
        ("mixtral", _other_count, "lacks 12 tensors, first model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        ("qwen3_moe", _other_count, "lacks 12 tensors, first model.layers.0.mlp.experts.4.gate_proj.weight"),
        ("qwen2_moe", _config(moe_intermediate_size=32), "mlp.experts.0.gate_proj.weight has shape [24, 48]"),
        ("qwen2_moe", _config(shared_expert_intermediate_size=24), "shared_expert.gate_proj.weight has shape"),
        ("gpt_oss", _other_count, "model.layers.0.mlp.router.weight has shape [4, 48] in the files and [5, 48]"),
        ("gpt_oss", _config(sliding_window=None), "sliding_window=None must be a whole number > 0 for the layers"),
        ("gpt_oss", _config(swiglu_alpha=1.5), "swiglu_alpha=1.5 is not supported for gpt_oss; it must be 1.702"),
        ("gpt_oss", _config(swiglu_limit=-1.0), "swiglu_limit=-1.0 must be a number > 0"),
        (
            "gpt_oss",
            _config(quantization_config={"quant_method": "fp8"}),
            "quantization_config.quant_method='fp8' is not read, only 'mxfp4'; let transformers dequantise",
        ),
        ("llama", _config(num_experts=4), "num_experts=4 is not supported for model_type=llama"),
    ],
)
def test_what_is_refused_is_one_useful_line(
    case: str, spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    save_tiny(case, tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_hf(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
