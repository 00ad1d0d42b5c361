"""One way to compute the distillation loss of a head, forward and backward, as passes for `bench.distill.linear_kd`.

    python -m bench.distill.head --way ours --hidden 576 --vocab 49152

Forward KL, temperature 1, mean over the tokens; gradients to the student's hidden states and head. Only torch and the
tool in question are imported: this module runs in the environments of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.common.worker import Pass, answers_only, serve

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Hidden states, head, teacher's hidden states, teacher's head, labels -> mean loss with its graph."""


def plain() -> Way:
    """Plain torch makes all logits, the float32 log-softmax of both models, and the KL."""

    def loss(hidden_NH: Tensor, weight_VH: Tensor, teacher_NG: Tensor, teacher_VG: Tensor, labels_N: Tensor) -> Tensor:
        with torch.no_grad():
            log_p_NV = torch.log_softmax(teacher_NG @ teacher_VG.T, dim=-1, dtype=torch.float32)
        log_q_NV = torch.log_softmax(hidden_NH @ weight_VH.T, dim=-1, dtype=torch.float32)
        return torch.nn.functional.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)

    return loss


def ours(fused: bool | None = None) -> Way:
    """This package runs `linear_kd` with the chunk that the default of `distill.loss_memory_mib` gives.

    `fused` says whether by kernels; None takes them on a GPU.
    """
    from compactlm_nemo.config.distill import DistillConfig
    from compactlm_nemo.config.loss import LossConfig
    from compactlm_nemo.losses.linear_kd import linear_kd
    from compactlm_nemo.losses.targets import TeacherHead
    from compactlm_nemo.losses.vocabulary import Head, VocabShard, chunk_tokens

    memory_mib = DistillConfig().loss_memory_mib

    def loss(hidden_NH: Tensor, weight_VH: Tensor, teacher_NG: Tensor, teacher_VG: Tensor, labels_N: Tensor) -> Tensor:
        tokens = chunk_tokens(memory_mib, *weight_VH.shape, dtype=weight_VH.dtype, device=weight_VH.device)
        head = Head(weight_VH, VocabShard(len(weight_VH)), tokens, fused)
        targets, mask_N = TeacherHead(teacher_NG, teacher_VG), torch.ones(len(labels_N), device=labels_N.device)
        losses = linear_kd(hidden_NH, head, targets, labels_N, mask_N, loss=LossConfig(), backward_once=True)
        return losses.loss_sum / len(labels_N)

    return loss


def liger(compiled: bool) -> Way:
    """Liger runs its chunked distillation; its JSD with beta 0 is the forward KL, its default chunks 1024 tokens."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)


WAYS: dict[str, Callable[[], Way]] = {
    "plain torch": plain,
    "ours": ours,
    "Liger, compiled": partial(liger, True),
    "Liger": partial(liger, False),
}


class Subject:
    """A subject holds the heads of student and teacher, of one width, and makes the tokens of a pass."""

    def __init__(self, way: Way, hidden: int, vocab: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.way, self.hidden, self.rng = way, hidden, rng
        self.weight_VH = torch.randn(vocab, hidden, generator=rng).mul_(hidden**-0.5).requires_grad_()
        self.teacher_VG = torch.randn(vocab, hidden, generator=rng).mul_(hidden**-0.5)

    def once(self, tokens: int) -> dict[str, Tensor]:
        """Returns loss and gradients of a number of tokens, which alone decides the values."""
        self.rng.manual_seed(tokens)
        hidden_NH = torch.randn(tokens, self.hidden, generator=self.rng).requires_grad_()
        teacher_NG = torch.randn(tokens, self.hidden, generator=self.rng)
        labels_N = torch.randint(len(self.weight_VH), (tokens,), generator=self.rng)
        self.weight_VH.grad = None
        loss = self.way(hidden_NH, self.weight_VH, teacher_NG, self.teacher_VG, labels_N)
        loss.backward()
        assert hidden_NH.grad is not None and self.weight_VH.grad is not None
        return {"loss": loss.detach(), "hidden": hidden_NH.grad, "head": self.weight_VH.grad[:64]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    args = parser.parse_args()
    answers = answers_only()
    subject = Subject(WAYS[args.way](), args.hidden, args.vocab)
    passes: dict[str, Pass] = {str(tokens): partial(subject.once, tokens) for tokens in args.tokens}
    serve(answers, passes, {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
