"""What the head holds and starts on a card: no logits in float32, under 2 GiB beside weights and gradients.

Runs on fake CUDA devices alone (`make fakecuda`), at full size: 8,192 tokens and a vocabulary of 128,256.

Shape suffixes: N tokens, V vocabulary, H student width, G teacher width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from compactlm_nemo.config.loss import CROSS_ENTROPY, LossConfig
from compactlm_nemo.losses.linear_ce import linear_ce
from compactlm_nemo.losses.linear_kd import linear_kd
from compactlm_nemo.losses.targets import NoTargets, Targets, TeacherHead, TopK, top_k_targets
from compactlm_nemo.losses.vocabulary import Head, VocabShard, chunk_tokens

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_name().endswith("(stub)")),
    reason="needs the fake CUDA devices of `make fakecuda`",
)

TOKENS, VOCAB, TEACHER_WIDTH = 8192, 128256, 4096
KERNELS = {"logit_statistics", "mixture_sums", "logit_gradient", "add_product"}


class Memory(TorchDispatchMode):
    """Follows the bytes of all tensors that are made, the dtypes of logits among them, and our kernels by name."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = {StorageWeakRef(each.untyped_storage()).cdata for each in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.started, self.logit_dtypes = 0, list[str](), set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.started += {func.__name__.split(".")[0]} & KERNELS
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor) and each.is_cuda:
                storage = each.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.inputs:
                    self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
                    if each.dim() == 2 and each.shape[1] == VOCAB:
                        self.logit_dtypes.add(each.dtype)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.alive.values()))
        return out


def bf16(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)


LOSSES = {
    "teacher": LossConfig(),
    "every loss": LossConfig(reverse_kl=1.0, jsd=1.0, skewed_kl=1.0, mse=1.0, cosine=1.0, cross_entropy=1.0),
    "nobody": CROSS_ENTROPY,
    "stored": LossConfig(cross_entropy=1.0),
}


@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("name", LOSSES)
def test_the_head_holds_its_logits_in_bf16_and_under_two_gibibytes(name: str, width: int) -> None:
    with FakeTensorMode():
        hidden_NH, weight_VH = bf16(TOKENS, width, requires_grad=True), bf16(VOCAB, width, requires_grad=True)
        teacher_NG, teacher_VG = bf16(TOKENS, TEACHER_WIDTH), bf16(VOCAB, TEACHER_WIDTH)
        labels_N = torch.zeros(TOKENS, dtype=torch.long, device="cuda")
        ones_N = torch.ones(TOKENS, device="cuda")
        tokens = chunk_tokens(None, VOCAB, width, dtype=weight_VH.dtype, device=weight_VH.device)
        head = Head(weight_VH, VocabShard(VOCAB), tokens)
        teacher_head = Head(teacher_VG, VocabShard(VOCAB), tokens)
        stored = top_k_targets(teacher_NG, teacher_head, labels_N, k=64)
        assert stored.ids_NK.shape == (TOKENS, 64) and stored.probs_NK.dtype == torch.float32
        targets: dict[str, Targets] = {"nobody": NoTargets(TOKENS), "stored": TopK(*stored)}
        target = targets.get(name, TeacherHead(teacher_NG, teacher_VG))
        inputs = [hidden_NH, weight_VH, teacher_NG, teacher_VG, labels_N, ones_N, *stored]
        temperature = 2.0 if name == "every loss" else 1.0
        with Memory(inputs) as memory:
            losses = linear_kd(
                hidden_NH, head, target, labels_N, ones_N,
                loss=LOSSES[name], temperature=temperature, backward_once=True,
            )  # fmt: skip
            losses.loss_sum.backward()
        assert hidden_NH.grad is not None and hidden_NH.grad.is_cuda and weight_VH.grad.dtype == torch.bfloat16
        assert memory.logit_dtypes == {torch.bfloat16}
        assert memory.peak - hidden_NH.grad.nbytes - weight_VH.grad.nbytes <= 2 * 2**30
        passes = ["logit_statistics", "mixture_sums", "logit_gradient", "add_product"]
        if name != "every loss":
            passes.remove("mixture_sums")
        assert memory.started == passes * -(-TOKENS // tokens)
        with Memory(inputs) as memory:
            assert linear_ce(hidden_NH, head, labels_N, ones_N).shape == (TOKENS,)
        assert set(memory.started) == {"logit_statistics"} and memory.logit_dtypes == {torch.bfloat16}
