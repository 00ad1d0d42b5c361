"""The kernels of the logit losses as a compiler and as torch see them, and what they read, write and hold.

Shape suffixes: N tokens, V vocabulary, H student width.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses import kernels
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.logit_losses import weighted_losses
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK
from compactlm_nemo.losses.vocabulary import FUSED_LEAST_MIB, Head, VocabShard, chunk_tokens
from tests.losses.reference import LOSSES
from tests.support import compiled_kernels

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS, REGISTERS = 32 * kernels.OPTIONS["num_warps"], 65536
"""Threads of a program; registers of a multiprocessor."""


def test_every_loss_has_a_kernel() -> None:
    assert tuple(weighted_losses(LossConfig(**dict.fromkeys(LOSSES, 1.0)))) == kernels.LOSSES


def test_kernels_compile_for_gpus_and_fit_their_registers(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", compiled_kernels.__name__], capture_output=True, text=True, cwd=ROOT,
        env={**env, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    assert {usage["capability"] for usage in usages} == {80, 90} and len(usages) == 14
    for usage in usages:
        assert usage["spilled"] == 0 and usage["shared"] < 48 * 2**10, usage
        # Four programs of 256 threads keep enough loads under way for the memory; all losses together need not.
        programs = REGISTERS // (THREADS * usage["registers"])
        assert programs >= (1 if usage["losses"] == "every" else 4), usage


def test_torch_sees_operators() -> None:
    student_NV, teacher_NV = torch.randn(2, 20, device=DEVICE), torch.randn(2, 20, device=DEVICE)
    weights, logs = [1.0] * 6, [-0.7] * 4
    four_NC, labels_N = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    calls = [
        (kernels.statistics, (student_NV, teacher_NV, 2.0, weights)),
        (kernels.statistics, (student_NV, None, 1.0, [0.0] * 6)),
        (kernels.mixtures, (student_NV, teacher_NV, four_NC, 2.0, logs, weights)),
        (kernels.gradient, (student_NV, teacher_NV, torch.zeros(2, 11), labels_N, 2.0, 0.5, logs, weights)),
        (kernels.add_product, (torch.zeros(20, 3), student_NV.bfloat16(), torch.ones(2, 3).bfloat16(), False)),
    ]
    for operator, args in calls:
        args = tuple(each.to(DEVICE) if isinstance(each, Tensor) else each for each in args)
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


class Recorder(TorchDispatchMode):
    """A recorder takes the names of our operators, and the largest bytes of any float32 tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "compactlm_nemo":
            self.names.append(func.__name__.split(".")[0])
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.nbytes)
        return out


STATISTICS, MIXTURES, GRADIENT, PRODUCT = "logit_statistics", "mixture_sums", "logit_gradient", "add_product"
TWO_PASSES = [STATISTICS, GRADIENT, PRODUCT]


@pytest.mark.parametrize(
    ("losses", "targets", "passes"),
    [
        (["forward_kl"], "teacher", TWO_PASSES),
        (["reverse_kl", "mse", "cosine", "cross_entropy"], "teacher", TWO_PASSES),
        (["forward_kl", "jsd", "skewed_kl"], "teacher", [STATISTICS, MIXTURES, GRADIENT, PRODUCT]),
        (["cross_entropy"], "nobody", TWO_PASSES),
        (["forward_kl", "cross_entropy"], "stored", TWO_PASSES),
    ],
)
def test_logits_are_read_twice_and_never_widened(losses: list[str], targets: str, passes: list[str]) -> None:
    tokens, vocab, width = 8, 300, 16
    hidden_NH, weight_VH = (torch.randn(n, width, device=DEVICE).bfloat16() for n in (tokens, vocab))
    ids_NK = torch.arange(4, device=DEVICE).repeat(tokens, 1)
    ones_N = torch.ones(tokens, device=DEVICE)
    compared: Targets = {
        "teacher": TeacherHead(hidden_NH, weight_VH.flip(0)),
        "nobody": NoTargets(tokens),
        "stored": TopK(ids_NK, torch.full_like(ids_NK, 0.1, dtype=torch.float32), 0.6 * ones_N, ones_N),
    }[targets]
    loss = LossConfig(**({"forward_kl": 0.0} | dict.fromkeys(losses, 1.0)))
    labels_N = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    for trained in (True, False):
        leaf_NH, leaf_VH = hidden_NH.clone().requires_grad_(trained), weight_VH.clone().requires_grad_(trained)
        head = Head(leaf_VH, VocabShard(vocab), chunk_tokens=tokens, fused=True)
        with Recorder() as seen:
            linear_kd(leaf_NH, head, compared, labels_N, ones_N, loss=loss)
        assert seen.names == (passes if trained else [each for each in passes if each not in (GRADIENT, PRODUCT)])
        # The sum of the head's gradient, and without it a few numbers a token.
        assert seen.largest <= (vocab * width if trained else 64 * tokens) * torch.float32.itemsize


def test_apex_accumulates_where_torch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_VH = torch.full((5, 3), torch.nan)
    grad_NV, hidden_NH = torch.randn(2, 5).bfloat16(), torch.randn(2, 3).bfloat16()
    product_VH = grad_NV.float().T @ hidden_NH.float()
    calls = []

    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        calls.append(main_grad.data_ptr())
        main_grad += grad_output.float().T @ inputs.float()

    monkeypatch.setattr(kernels, "_torch_adds_to_float32", lambda device, dtype: False)
    monkeypatch.setattr(kernels, "_apex_accumulation", lambda device: wgrad_gemm_accum_fp32)
    kernels.add_product(sum_VH, grad_NV, hidden_NH, True)
    kernels.add_product(sum_VH, grad_NV, hidden_NH, False)
    assert calls == [sum_VH.data_ptr()] * 2
    torch.testing.assert_close(sum_VH, 2 * product_VH)


def test_a_product_that_nobody_accumulates_is_added() -> None:
    sum_VH = torch.full((5, 3), torch.nan)
    grad_NV, hidden_NH = torch.randn(2, 5).bfloat16(), torch.randn(2, 3).bfloat16()
    assert not kernels._torch_adds_to_float32(torch.device("cpu"), torch.bfloat16)
    assert kernels._apex_accumulation(torch.device("cpu")) is None
    for is_first in (True, False):
        kernels.add_product(sum_VH, grad_NV, hidden_NH, is_first)
    torch.testing.assert_close(sum_VH, 2 * (grad_NV.T @ hidden_NH).float())


def test_a_cpu_needs_no_triton() -> None:
    code = """
import sys, torch
sys.modules["triton"] = None
from compactlm_nemo.config.loss import LossConfig
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.targets import TeacherHead
from compactlm_nemo.losses.vocabulary import Head, VocabShard
x = torch.ones(2, 3, requires_grad=True)
head = Head(torch.ones(5, 3), VocabShard(5), 2)
linear_kd(x, head, TeacherHead(x, head.weight_VH), torch.ones(2).long(), torch.ones(2), loss=LossConfig())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Of the paper's model on one rank, and on eight.
@pytest.mark.parametrize(
    ("rows", "width", "tokens"), [(128256, 4096, 2048), (128256, 2048, 2048), (16032, 4096, 16640)]
)
def test_a_chunk_on_a_gpu_is_its_logits_alone(rows: int, width: int, tokens: int) -> None:
    got = chunk_tokens(None, rows, width, dtype=torch.bfloat16, device="cuda")
    assert got == tokens
    logits_bytes = 2 * tokens * rows * torch.bfloat16.itemsize
    assert logits_bytes <= FUSED_LEAST_MIB * 2**20 < logits_bytes + 2 * 128 * rows * torch.bfloat16.itemsize
    # Beside the gradient in bf16, at most its float32 sum or that sum's first half and a chunk.
    assert rows * width * 2 + logits_bytes <= 2.2e9
    assert chunk_tokens(1, rows, width, dtype=torch.bfloat16, device="cuda") == 2**20 // (4 * rows)
    wide = chunk_tokens(None, rows, width, dtype=torch.float64, device="cuda")
    assert wide == chunk_tokens(None, rows, width, dtype=torch.float64, device="cpu")
