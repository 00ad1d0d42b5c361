"""Hidden-state losses on every layout, against transformers' models and autograd in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig, Recompute
from compactlm_nemo.config.loss import HiddenConfig, LossConfig, Projection, StateLoss
from compactlm_nemo.distill.hidden_states import ALPHA, HiddenStateLoss
from compactlm_nemo.distill.layer_pairs import layer_pairs
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.build import recompute_activations, tp_share
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.callbacks import MetricsLog, StopAfter
from compactlm_nemo.training.checkpoint import Checkpoints
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.distill.test_parallel import STUDENT, gradients, samples
from tests.distill.test_resume import sample
from tests.support.meshes import COMBINED, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CASES = ("llama_biases", "nemotron")


# The teacher's states are on other stages than the student's, and one of the student's places has two partners.
MAPS: dict[str, Any] = {"layers": [[0, -1], [3, 0], [1, 0]], "attention": [[3, 1]], "mlp_input": [[0, 2]]}


SETTINGS = {
    "mse": HiddenConfig(**MAPS, embedding=True, weight=0.7),
    "cosine": HiddenConfig(**MAPS, embedding=True, loss=StateLoss.cosine, projection=Projection.per_pair, weight=3.0),
}


BALANCED = HiddenConfig(layers=[[-3, -3]], embedding=True)


WIDTH, TEACHER_WIDTH = 32, 48


TRAINING = DistillConfig(steps=4, global_batch=4, micro_batch=1, lr=1e-2, checkpoint_every=2, hidden=BALANCED)


def start() -> Tensor:
    """What projections begin at."""
    return torch.randn(TEACHER_WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5


def states(model: Any, tokens_BS: Tensor) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """(kind, layer) -> `[B, S, H]` of transformers' modules, and the logits."""
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []

    def see(module: Any, kind: str, layer: int) -> None:
        def hook(_: Any, args: Any, out: Any) -> None:
            seen[kind, layer] = out[0] if isinstance(out, tuple) else out

        handles.append(module.register_forward_hook(hook))

    layers = model.model.layers
    see(model.model.embed_tokens, "embedding", 0)
    for i, layer in enumerate(layers):
        see(layers[i + 1].input_layernorm if i + 1 < len(layers) else model.model.norm, "layers", i)
        see(layer.self_attn, "attention", i)
        see(layer.post_attention_layernorm, "mlp_input", i)
    logits = model(tokens_BS).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def reference(student: Any, teacher: Any, cfg: HiddenConfig) -> dict[str, Any]:
    """Loss terms by the definition; gradients stay in the student, those of projections are in `projections`."""
    tokens = samples()
    ours, logits = states(student, tokens[:, :-1])
    with torch.no_grad():
        theirs, wanted = states(teacher, tokens[:, :-1])
    pairs = [("embedding", 0, 0)] if cfg.embedding else []
    for kind in MAPS:
        pairs += [(kind, a % 4, b % 4) for a, b in getattr(cfg, kind)]
    count = 1 if cfg.projection is Projection.shared else len(pairs)
    maps = [start().double().requires_grad_() for _ in range(count)]
    values = {}
    for number, (kind, a, b) in enumerate(pairs):
        projected = ours[kind, b] @ maps[number % count].T
        if cfg.loss is StateLoss.mse:
            value = ((projected - theirs[kind, a]) ** 2).mean()
        else:
            cosine = (projected * theirs[kind, a]).sum(-1) / projected.norm(dim=-1) / theirs[kind, a].norm(dim=-1)
            value = (1 - cosine).mean()
        values[f"train/hidden_{kind}" + ("" if kind == "embedding" else f"_{a}_{b}")] = value
    log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(wanted, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    hidden = sum(values.values())
    alpha = (kl / hidden).item() if cfg.weight is None else cfg.weight
    total = kl + alpha * hidden
    total.backward()
    terms = {name: value.item() for name, value in values.items()}
    terms |= {"train/loss": total.item(), "train/kd_forward_kl": kl.item(), ALPHA: alpha}
    return {"terms": terms, "projections": [one.grad for one in maps]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case and setting the models, the terms, and the student's gradients written as if they were weights."""
    root = tmp_path_factory.mktemp("hidden")
    for case in CASES:
        for name, cfg in (SETTINGS | {"balanced": BALANCED}).items():
            teacher = save_tiny(case, root / case / "teacher").double()
            student = save_tiny(case, root / case / "student", **STUDENT).double()
            torch.save(reference(student, teacher, cfg), root / case / f"{name}.pt")
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.copy_(parameter.grad)
            student.float().save_pretrained(root / case / name)
    return root


def built(folder: Path, mesh: Mesh, cfg: HiddenConfig) -> tuple[Dims, Any, LiveTeacher, HiddenStateLoss]:
    dims, student = filled(folder / "student", mesh)
    teacher_dims, teacher = filled(folder / "teacher", mesh)
    pairs = layer_pairs(cfg, teacher_dims, dims)
    projections = Projections(len(pairs), cfg.projection is Projection.shared, start(), TRAINING)
    loss = HiddenStateLoss(cfg, pairs, teacher, student, projections)
    return dims, student, LiveTeacher(teacher, loss.before_teacher_micro_batch), loss


def _matches(
    rank: int, world: int, layout: dict[str, Any], root: Path, names: list[str], recompute: Recompute = Recompute.none
) -> None:
    mesh = mesh_of(**layout)
    for case in CASES:
        for name in names:
            cfg = SETTINGS.get(name, BALANCED)
            dims, student, teacher, loss = built(root / case, mesh, cfg)
            recompute_activations(student, recompute)
            ddps = wrap_data_parallel(student.train())
            batches = [Batch(part, ()) for part in samples()[mesh.dp_rank :: mesh.dp_size].split(1)]
            for _ in range(2):  # the second must not see anything of the first
                terms = forward_backward(ddps, teacher, batches, loss=LossConfig(), temperature=1.0, callbacks=[loss])
            want = torch.load(root / case / f"{name}.pt")
            assert {key: terms[key] for key in want["terms"]} == pytest.approx(want["terms"], rel=2e-5), (case, name)
            assert loss.projections is not None and not loss.teacher_states and not any(loss.recomputed)
            for got, grad in zip(loss.projections.weights, want["projections"], strict=True):
                # The gradient of the loss, of which the loss terms have alpha.
                close(got.grad, grad.float(), f"{case} {name} projection")
            _, wanted = open_hf(root / case / name)
            padded = dims.padded_vocab(mesh.tp_size, VOCAB_MULTIPLE)
            for parameter, got in gradients(ddps).items():
                whole = wanted(parameter)
                share = tp_share(
                    parameter, whole, rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp, padded_vocab=padded
                )
                close(got, share, f"{case} {name} {parameter}")


def close(got: Tensor, want: Tensor, what: str) -> None:
    scale = max(float(want.abs().max()), 1e-6)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=5e-5 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("layout", COMBINED)
def test_losses_and_gradients_are_the_definition_in_every_layout(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, root, ["mse", "cosine"])


@pytest.mark.parametrize("layout", ["tp2_sp", "vpp2"])
def test_recomputed_activations_give_the_same(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, root, ["mse"], Recompute.full)


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2"])
def test_alpha_balances_the_losses_of_the_same_weights(layout, root, tmp_path):
    """The weights do not move between the steps, so the ratio of the step before is that of this one."""
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, root, ["balanced"])


def train(root: Path, mesh: Mesh, folder: Path, stop_after: int | None) -> dict[int, dict[str, float]]:
    dims, student, teacher, loss = built(root / CASES[0], mesh, BALANCED)
    seen: dict[int, dict[str, float]] = {}
    log = MetricsLog(lambda step, values: seen.update({step: values}), every=1)
    distill(
        student,
        teacher,
        sample,
        TRAINING,
        [StopAfter(stop_after), loss, log],
        checkpoints=Checkpoints(folder, keep=2, is_main=torch.distributed.get_rank() == 0),
    )
    return seen


def _trains(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    whole = train(root, mesh, root / "whole", None)
    torch.save(whole, root / "metrics.pt")
    before = train(root, mesh, root / "stopped", 2)
    shutil.copytree(root / "stopped", root / "at_stop")
    assert before | train(root, mesh, root / "stopped", None) == whole
    for step in range(3):
        hidden = sum(v for k, v in whole[step].items() if k.startswith("train/hidden_") and k != ALPHA)
        assert whole[step + 1][ALPHA] == pytest.approx(whole[step]["train/kd_forward_kl"] / hidden, rel=1e-12)


def _goes_on(rank: int, world: int, layout: str, root: Path, checkpoints: Path) -> None:
    got = train(root, mesh_of(**LAYOUTS[layout][1]), checkpoints, None)
    want = torch.load(root / "metrics.pt")
    assert sorted(got) == [2, 3]
    for step, values in got.items():
        assert values == pytest.approx(want[step], rel=2e-4), step


def test_training_goes_on_in_any_layout(root, tmp_path):
    """Alpha, the projections and their moments are in the checkpoint; on the same layout to the last bit."""
    run_ranks(_trains, 1, tmp_path, root)
    for layout in ("tp2_sp", "vpp2", "dp2"):
        checkpoints = Path(shutil.copytree(root / "at_stop", tmp_path / layout))
        run_ranks(_goes_on, 2, tmp_path, layout, root, checkpoints)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (HiddenConfig(layers=[[4, 0]]), "layer 4 must be one of the teacher's 4"),
        (HiddenConfig(attention=[[0, -5]]), "layer -5 must be one of the student's 4"),
        (HiddenConfig(embedding=True, projection=Projection.none), "projection=none needs equal widths, not 48 and 32"),
    ],
)
def test_maps_that_no_model_has_are_refused(cfg, words, root):
    (teacher, _), (student, _) = (open_hf(root / CASES[0] / who) for who in ("teacher", "student"))
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        layer_pairs(cfg, teacher, student)


def test_a_pair_has_two_layers():
    with pytest.raises(ConfigError, match=r"\[1\] must be \[teacher layer, student layer\]"):
        HiddenConfig(layers=[[1]])
