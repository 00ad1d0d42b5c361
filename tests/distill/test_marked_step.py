"""A step whose samples mark most predictions as not counting, on every layout, against float64 and autograd.

The reference takes the rows of the predictions that count and nothing else; it knows neither marks nor masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.config.loss import HiddenConfig, LossConfig, Projection
from compactlm_nemo.data.marks import counts_of, ids_of, mark
from compactlm_nemo.distill.hidden_states import ALPHA
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import NoTeacher
from compactlm_nemo.models.build import tp_share
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.optimizer import wrap_data_parallel
from tests.distill.test_hidden_states import MAPS, SETTINGS, built, close, start, states
from tests.distill.test_parallel import LENGTH, STUDENT, gradients, samples
from tests.support.meshes import COMBINED, LAYOUTS, VOCAB_MULTIPLE, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny

CASES = ("llama_biases", "nemotron")
TEMPERATURE = 2.0
LOSSES = LossConfig(
    forward_kl=0.5, reverse_kl=0.2, jsd=0.3, jsd_beta=0.4, skewed_kl=0.4, mse=0.05, cosine=0.6, cross_entropy=0.7
)

# Of two data-parallel ranks the second, with samples 1 and 3, has nothing; so have two micro-batches of four, and under
# context parallelism the first rank in sample 0 and the second in sample 2.
COUNTED = {0: [4, 5, 6], 2: [0, 10]}


def counts() -> Tensor:
    counts_BS = torch.zeros(4, LENGTH + 1, dtype=torch.bool)
    for sample, places in COUNTED.items():
        counts_BS[sample, places] = True
    return counts_BS


def marked_samples() -> Tensor:
    return mark(samples(), counts())


def logit_losses(x: Tensor, y: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Means over rows of each loss of student logits x and teacher logits y, from their definitions."""
    t = TEMPERATURE
    q, p = F.softmax(x / t, -1), F.softmax(y / t, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    m, skewed = 0.4 * p + 0.6 * q, 0.1 * p + 0.9 * q
    gap = (x - y) / t
    return {
        "forward_kl": t**2 * kl(p, q),
        "reverse_kl": t**2 * kl(q, p),
        "jsd": t**2 * (0.4 * kl(p, m) + 0.6 * kl(q, m)),
        "skewed_kl": t**2 * kl(p, skewed),
        "mse": t**2 * (gap**2).mean(-1).mean(),
        "cosine": t**2 * (1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean(),
        "cross_entropy": -F.softmax(x, -1)[torch.arange(len(labels)), labels].log().mean(),
    }


def reference(student: Any, teacher: Any, cfg: HiddenConfig) -> dict[str, Any]:
    """Loss terms of the counted rows alone; the gradient of their sum stays in the student."""
    tokens, rows = samples(), counts()[:, :-1]
    ours, logits = states(student, tokens[:, :-1])
    with torch.no_grad():
        theirs, wanted = states(teacher, tokens[:, :-1])
    labels = tokens[:, 1:][rows]
    losses = logit_losses(logits[rows], wanted[rows], labels)
    weighted = sum((getattr(LOSSES, name) * value for name, value in losses.items()), torch.zeros(()))
    pairs = [("embedding", 0, 0)] + [(kind, a % 4, b % 4) for kind in MAPS for a, b in getattr(cfg, kind)]
    maps = [start().double().requires_grad_() for _ in range(1 if cfg.projection is Projection.shared else len(pairs))]
    hidden = {}
    for number, (kind, a, b) in enumerate(pairs):
        s, t = ours[kind, b][rows] @ maps[number % len(maps)].T, theirs[kind, a][rows]
        value = ((s - t) ** 2).mean() if cfg.loss.name == "mse" else (1 - F.cosine_similarity(s, t, dim=-1)).mean()
        hidden[f"train/hidden_{kind}" + ("" if kind == "embedding" else f"_{a}_{b}")] = value
    assert cfg.weight is not None
    total = weighted + cfg.weight * sum(hidden.values(), torch.zeros(()))
    total.backward()
    cross_entropy = losses.pop("cross_entropy")
    terms = {"train/loss": total, "train/lm_loss_nats": cross_entropy, **hidden}
    terms |= {f"train/kd_{name}": value for name, value in losses.items()}
    values = {name: value.item() for name, value in terms.items()} | {ALPHA: cfg.weight, "train/tokens": 5.0}
    values["train/teacher_lm_loss_nats"] = F.cross_entropy(wanted[rows], labels).item()
    return {"terms": values, "projections": [one.grad for one in maps]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("marked")
    for case in CASES:
        for name, cfg in SETTINGS.items():
            teacher = save_tiny(case, root / case / "teacher").double()
            student = save_tiny(case, root / case / "student", **STUDENT).double()
            torch.save(reference(student, teacher, cfg), root / case / f"{name}.pt")
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.copy_(parameter.grad)
            student.float().save_pretrained(root / case / name)
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], root: Path, micro_batch: int) -> None:
    mesh = mesh_of(**layout)
    for case in CASES:
        for name, cfg in SETTINGS.items():
            dims, student, teacher, loss = built(root / case, mesh, cfg)
            ddps = wrap_data_parallel(student.train())
            parts = marked_samples()[mesh.dp_rank :: mesh.dp_size].split(micro_batch)
            batches = [Batch(part, ()) for part in parts]
            for _ in range(2):  # the second must not see anything of the first
                terms = forward_backward(ddps, teacher, batches, loss=LOSSES, temperature=TEMPERATURE, callbacks=[loss])
            want = torch.load(root / case / f"{name}.pt")
            assert terms == pytest.approx(want["terms"], rel=2e-5), (case, name)
            assert loss.projections is not None
            for got, grad in zip(loss.projections.weights, want["projections"], strict=True):
                close(got.grad, grad.float(), f"{case} {name} projection")
            _, wanted = open_hf(root / case / name)
            padded = dims.padded_vocab(mesh.tp_size, VOCAB_MULTIPLE)
            for parameter, got in gradients(ddps).items():
                share = tp_share(
                    parameter, wanted(parameter), rank=mesh.tp_rank, size=mesh.tp_size, gated=dims.gated_mlp,
                    padded_vocab=padded,
                )  # fmt: skip
                close(got, share, f"{case} {name} {parameter}")


@pytest.mark.parametrize("layout", COMBINED)
def test_a_step_counts_marked_samples_by_the_definition_in_every_layout(layout, root, tmp_path):
    ranks, fields = LAYOUTS[layout]
    run_ranks(_matches, ranks, tmp_path, fields, root, 1)


def test_a_micro_batch_may_hold_samples_with_and_without_answers(root, tmp_path):
    run_ranks(_matches, 1, tmp_path, {}, root, 2)


def _nothing_counts(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    _, student = filled(root / CASES[0] / "student", mesh)
    ddps = wrap_data_parallel(student.train())
    batches = [Batch(mark(samples(), torch.zeros(4, LENGTH + 1, dtype=torch.bool))[rank::world], ())]
    loss = LossConfig(forward_kl=0.0, cross_entropy=1.0)
    terms = forward_backward(ddps, NoTeacher(mesh), batches, loss=loss, temperature=1.0)
    assert terms == {"train/loss": 0.0, "train/lm_loss_nats": 0.0, "train/tokens": 0.0}
    assert not any(bool(gradient.any()) for gradient in gradients(ddps).values())


def test_a_global_batch_in_which_nothing_counts_has_no_gradient(root, tmp_path):
    run_ranks(_nothing_counts, 2, tmp_path, root)


def test_marks_come_off_and_tokens_without_marks_are_as_they_were():
    tokens = torch.tensor([[0, 5, 130], [0, 5, 130]])
    counts_BS = torch.tensor([[False, True, False], [True, True, True]])
    marked = mark(tokens, counts_BS)
    assert marked.tolist() == [[-1, 5, -131], [0, 5, 130]]
    assert ids_of(marked).tolist() == tokens.tolist() and counts_of(marked).tolist() == counts_BS.tolist()
