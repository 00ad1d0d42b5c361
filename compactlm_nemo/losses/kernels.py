"""Triton kernels of the logit losses, as operators of torch. losses/fused.py calls them; the formulas are those of
losses/logit_losses.py.

A program of `_statistics` and of `_mixtures` reads all of one token's entries, one of `_gradient` a block of them. All
is float32 in registers: in memory there are only the logits, in the dtype of their product. Each operator says how
often it reads and writes a logit.

Shape suffixes: N tokens, V vocabulary rows of this rank, H width, S statistics, C coefficients, B a block of entries in
registers. In a kernel `z` is a logit of the student, `y` of the teacher, not yet divided by T, `x` and `w` after it.
"""

import importlib
from functools import cache

import torch
import triton
import triton.language as tl

from compactlm_nemo.losses import plain

LOSSES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "mse", "cosine")
"""The order of the weights that operators take; a loss of weight 0 is not computed."""


BLOCK = 2048
"""Entries of one token that a program holds at a time."""


OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""A thread then loads 16 bytes of bf16 at once."""


@triton.jit
def _softmax_step(z_B, top, sum_B, plain_B, inverse_t, AT_ONE: tl.constexpr):
    """Add a block to the running sums of ``exp((z - top) / T)`` and ``exp(z - top)``, with the new maximum."""
    new_top = tl.maximum(top, tl.max(z_B, 0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has no entry yet
    scale = tl.exp((top - shift) * inverse_t)
    e_B = tl.exp((z_B - shift) * inverse_t)
    sum_B = sum_B * scale + e_B
    if not AT_ONE:
        plain_B = plain_B * tl.exp(top - shift) + tl.exp(z_B - shift)
    return new_top, scale, e_B, sum_B, plain_B


@triton.jit
def _statistics(
    student_NV, teacher_NV, out_NS, inverse_t,
    V: tl.constexpr, B: tl.constexpr, AT_ONE: tl.constexpr, TEACHER: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, MSE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Write what `statistics` returns for one token; sums are relative to the maximum so far."""
    n = tl.program_id(0).to(tl.int64)
    nothing_B = tl.zeros([B], tl.float32)
    top_s, top_t = -float("inf"), -float("inf")
    sum_s_B, plain_s_B, sum_t_B, plain_t_B = nothing_B, nothing_B, nothing_B, nothing_B
    forward_B, reverse_B, square_B, product_B, norm_s_B, norm_t_B = (
        nothing_B, nothing_B, nothing_B, nothing_B, nothing_B, nothing_B
    )  # fmt: skip
    for start in range(0, V, B):
        column_B = start + tl.arange(0, B)
        inside_B = column_B < V
        z_B = tl.load(student_NV + n * V + column_B, mask=inside_B, other=-float("inf")).to(tl.float32)
        top_s, scale_s, e_s_B, sum_s_B, plain_s_B = _softmax_step(z_B, top_s, sum_s_B, plain_s_B, inverse_t, AT_ONE)
        if TEACHER:
            y_B = tl.load(teacher_NV + n * V + column_B, mask=inside_B, other=-float("inf")).to(tl.float32)
            top_t, scale_t, e_t_B, sum_t_B, plain_t_B = _softmax_step(y_B, top_t, sum_t_B, plain_t_B, inverse_t, AT_ONE)
            z_B, y_B = tl.where(inside_B, z_B, 0.0), tl.where(inside_B, y_B, 0.0)
            gap_B = (z_B - y_B) * inverse_t
            if FORWARD:
                forward_B = forward_B * scale_t - e_t_B * gap_B
            if REVERSE:
                reverse_B = reverse_B * scale_s + e_s_B * gap_B
            if MSE:
                square_B += gap_B * gap_B
            if COSINE:
                x_B, w_B = z_B * inverse_t, y_B * inverse_t
                product_B += x_B * w_B
                norm_s_B += x_B * x_B
                norm_t_B += w_B * w_B
    if AT_ONE:
        plain_s_B, plain_t_B = sum_s_B, sum_t_B
    S: tl.constexpr = 12 if TEACHER else 3
    out = out_NS + n * S
    tl.store(out, top_s)
    tl.store(out + 1, tl.sum(sum_s_B, 0))
    tl.store(out + 2, tl.sum(plain_s_B, 0))
    if TEACHER:
        tl.store(out + 3, top_t)
        tl.store(out + 4, tl.sum(sum_t_B, 0))
        tl.store(out + 5, tl.sum(plain_t_B, 0))
        tl.store(out + 6, tl.sum(forward_B, 0))
        tl.store(out + 7, tl.sum(reverse_B, 0))
        tl.store(out + 8, tl.sum(square_B, 0))
        tl.store(out + 9, tl.sum(product_B, 0))
        tl.store(out + 10, tl.sum(norm_s_B, 0))
        tl.store(out + 11, tl.sum(norm_t_B, 0))


@triton.jit
def _log_mixture(log_p_B, log_q_B, log_share, log_rest):
    """Give ``log(share p + rest q)``, with the larger factored out."""
    a_B, b_B = log_p_B + log_share, log_q_B + log_rest
    return tl.maximum(a_B, b_B) + tl.log(1.0 + tl.exp(-tl.abs(a_B - b_B)))


@triton.jit
def _mixtures(
    student_NV, teacher_NV, shift_NC, out_NS, inverse_t, jsd_log, jsd_rest, skew_log, skew_rest,
    V: tl.constexpr, B: tl.constexpr, JSD: tl.constexpr, SKEWED: tl.constexpr,
):  # fmt: skip
    """Write the JSD's ``sum p log(p/m)``, ``sum q log(q/m)``, the skewed KL's ``sum p log(p/m)``, ``sum p q/m``."""
    n = tl.program_id(0).to(tl.int64)
    top_s, log_s = tl.load(shift_NC + n * 4), tl.load(shift_NC + n * 4 + 1)
    top_t, log_t = tl.load(shift_NC + n * 4 + 2), tl.load(shift_NC + n * 4 + 3)
    nothing_B = tl.zeros([B], tl.float32)
    jsd_t_B, jsd_s_B, skewed_B, pull_B = nothing_B, nothing_B, nothing_B, nothing_B
    for start in range(0, V, B):
        column_B = start + tl.arange(0, B)
        inside_B = column_B < V
        z_B = tl.load(student_NV + n * V + column_B, mask=inside_B, other=0.0).to(tl.float32)
        y_B = tl.load(teacher_NV + n * V + column_B, mask=inside_B, other=0.0).to(tl.float32)
        log_q_B, log_p_B = (z_B - top_s) * inverse_t - log_s, (y_B - top_t) * inverse_t - log_t
        p_B = tl.where(inside_B, tl.exp(log_p_B), 0.0)
        if JSD:
            log_m_B = _log_mixture(log_p_B, log_q_B, jsd_log, jsd_rest)
            jsd_t_B += p_B * (log_p_B - log_m_B)
            jsd_s_B += tl.where(inside_B, tl.exp(log_q_B), 0.0) * (log_q_B - log_m_B)
        if SKEWED:
            log_m_B = _log_mixture(log_p_B, log_q_B, skew_log, skew_rest)
            skewed_B += p_B * (log_p_B - log_m_B)
            # In logarithms, because two probabilities that both underflow still have a quotient.
            pull_B += tl.where(inside_B, tl.exp(log_p_B + log_q_B - log_m_B), 0.0)
    out = out_NS + n * 4
    tl.store(out, tl.sum(jsd_t_B, 0))
    tl.store(out + 1, tl.sum(jsd_s_B, 0))
    tl.store(out + 2, tl.sum(skewed_B, 0))
    tl.store(out + 3, tl.sum(pull_B, 0))


@triton.jit
def _gradient(
    student_NV, teacher_NV, coefficient_NC, label_N, inverse_t, ce_weight, jsd_log, jsd_rest, skew_log, skew_rest,
    forward_weight, reverse_weight, jsd_weight, skewed_weight, mse_weight,
    V: tl.constexpr, B: tl.constexpr, CE: tl.constexpr, TEACHER: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr, JSD: tl.constexpr, SKEWED: tl.constexpr, MSE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one token's block over the student's logits; `gradient` says what the coefficients are."""
    n = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * B + tl.arange(0, B)
    inside_B = column_B < V
    here = student_NV + n * V + column_B
    C: tl.constexpr = 11 if TEACHER else 3
    given = coefficient_NC + n * C
    z_B = tl.load(here, mask=inside_B, other=0.0).to(tl.float32)
    top_s = tl.load(given)
    gradient_B = tl.zeros([B], tl.float32)
    if CE:
        gradient_B += tl.load(given + 2) * tl.exp((z_B - top_s) - tl.load(given + 1))
        gradient_B -= tl.where(column_B == tl.load(label_N + n), ce_weight, 0.0)
    if TEACHER:
        y_B = tl.load(teacher_NV + n * V + column_B, mask=inside_B, other=0.0).to(tl.float32)
        log_q_B = (z_B - top_s) * inverse_t - tl.load(given + 3)
        log_p_B = (y_B - tl.load(given + 4)) * inverse_t - tl.load(given + 5)
        q_B = tl.exp(log_q_B)
        if FORWARD:
            gradient_B += forward_weight * (q_B - tl.exp(log_p_B))
        if REVERSE:
            # The mean of x - w is subtracted from it, because what log q - log p adds to both cancels.
            gradient_B += reverse_weight * q_B * ((z_B - y_B) * inverse_t - tl.load(given + 6))
        if JSD:
            log_m_B = _log_mixture(log_p_B, log_q_B, jsd_log, jsd_rest)
            gradient_B += jsd_weight * q_B * (log_q_B - log_m_B - tl.load(given + 7))
        if SKEWED:
            log_m_B = _log_mixture(log_p_B, log_q_B, skew_log, skew_rest)
            gradient_B += skewed_weight * (q_B * tl.load(given + 8) - tl.exp(log_p_B + log_q_B - log_m_B))
        if MSE:
            gradient_B += mse_weight * (z_B - y_B)
        if COSINE:
            gradient_B += tl.load(given + 9) * z_B - tl.load(given + 10) * y_B
    tl.store(here, gradient_B.to(student_NV.dtype.element_ty), mask=inside_B)


# Operators of torch, so that fake tensors and torch.compile see shapes in their place.
_LIBRARY = "compactlm_nemo::"


@torch.library.custom_op(
    _LIBRARY + "logit_statistics",
    mutates_args=(),
    schema="(Tensor student_NV, Tensor? teacher_NV, float temperature, float[] weights) -> Tensor",
)
def statistics(student_NV, teacher_NV, temperature, weights):
    """Return ``[N, S]`` float32 over this rank's entries, by one read of each logit.

    Columns, for the student and then the teacher: maximum, ``sum exp((z - max) / T)``, ``sum exp(z - max)``. Beside a
    teacher then, with ``x`` and ``w`` the logits over T: ``sum exp((y - max) / T) (w - x)`` for the forward KL,
    ``sum exp((z - max) / T) (x - w)`` for the reverse KL, ``sum (x - w)**2``, ``sum x w``, ``sum x**2``, ``sum w**2``.
    """
    assert student_NV.is_contiguous()
    num_tokens, columns = student_NV.shape
    out_NS = _statistics_like(student_NV, teacher_NV, temperature, weights)
    if num_tokens:
        forward, reverse, _, _, mse, cosine = (weight != 0 for weight in weights)
        _statistics[num_tokens,](
            student_NV, teacher_NV, out_NS, 1 / temperature,
            V=columns, B=_block(columns), AT_ONE=temperature == 1, TEACHER=teacher_NV is not None,
            FORWARD=forward, REVERSE=reverse, MSE=mse, COSINE=cosine, **OPTIONS,
        )  # fmt: skip
    return out_NS


@statistics.register_fake
def _statistics_like(student_NV, teacher_NV, temperature, weights):
    return student_NV.new_empty(student_NV.shape[0], 3 if teacher_NV is None else 12, dtype=torch.float32)


@torch.library.custom_op(
    _LIBRARY + "mixture_sums",
    mutates_args=(),
    schema="(Tensor student_NV, Tensor teacher_NV, Tensor shift_NC, float temperature, float[] logs, float[] weights)"
    " -> Tensor",
)
def mixtures(student_NV, teacher_NV, shift_NC, temperature, logs, weights):
    """Return ``[N, 4]`` float32 over this rank's entries, by one read of each logit; `_mixtures` names the columns.

    `shift_NC` are, for the student and then the teacher, the maximum and the logarithm of the sum of exponentials at T;
    `logs` the logarithms of the teacher's and the student's share in the JSD's mixture, then in the skewed KL's.
    """
    num_tokens, columns = student_NV.shape
    out_NS = torch.empty_like(shift_NC)
    if num_tokens:
        _mixtures[num_tokens,](
            student_NV, teacher_NV, shift_NC, out_NS, 1 / temperature, *logs,
            V=columns, B=_block(columns), JSD=weights[2] != 0, SKEWED=weights[3] != 0, **OPTIONS,
        )  # fmt: skip
    return out_NS


@mixtures.register_fake
def _mixtures_like(student_NV, teacher_NV, shift_NC, temperature, logs, weights):
    return torch.empty_like(shift_NC)


@torch.library.custom_op(
    _LIBRARY + "logit_gradient",
    mutates_args=("student_NV",),
    schema="(Tensor(a!) student_NV, Tensor? teacher_NV, Tensor coefficient_NC, Tensor column_N, float temperature,"
    " float ce_weight, float[] logs, float[] weights) -> ()",
)
def gradient(student_NV, teacher_NV, coefficient_NC, column_N, temperature, ce_weight, logs, weights):
    """Write the gradient over the student's logits, by one read of each logit and one write of the student's.

    `coefficient_NC` are, of each token, the student's maximum, the logarithm of its sum of exponentials at T = 1 and
    what its softmax at T = 1 is multiplied by; beside a teacher then the logarithm of the student's sum at T, the
    teacher's maximum and logarithm at T, ``sum q (x - w)``, the JSD's ``sum q log(q/m)``, the skewed KL's
    ``sum p q/m``, and what the cosine multiplies the logits of both by. `column_N` is the label's column.
    """
    num_tokens, columns = student_NV.shape
    if num_tokens and columns:
        has_teacher = teacher_NV is not None
        forward, reverse, jsd, skewed, mse, cosine = (weight != 0 for weight in weights)
        _gradient[num_tokens, triton.cdiv(columns, _block(columns))](
            student_NV, teacher_NV, coefficient_NC, column_N, 1 / temperature, ce_weight, *logs, *weights[:5],
            V=columns, B=_block(columns), CE=ce_weight != 0 or not has_teacher, TEACHER=has_teacher, FORWARD=forward,
            REVERSE=reverse, JSD=jsd, SKEWED=skewed, MSE=mse, COSINE=cosine, **OPTIONS,
        )  # fmt: skip


@gradient.register_fake
def _nothing(*_):
    return None


@torch.library.custom_op(
    _LIBRARY + "add_product",
    mutates_args=("sum_VH",),
    schema="(Tensor(a!) sum_VH, Tensor left_NV, Tensor right_NH, bool is_first) -> ()",
)
def add_product(sum_VH, left_NV, right_NH, is_first):
    """Add ``left.T @ right`` to the float32 sum, or write it where this is the first; the sum is read and written once.

    By torch where it adds a product of bf16 to float32, or by apex; otherwise as in plain torch, which writes the
    product in bf16 and adds that.
    """
    if _torch_adds_to_float32(left_NV.device, left_NV.dtype):
        beta = 0 if is_first else 1
        torch.addmm(sum_VH, left_NV.T, right_NH, out_dtype=torch.float32, beta=beta, out=sum_VH)
    elif accumulate := _apex_accumulation(left_NV.device):
        accumulate(right_NH, left_NV, sum_VH.zero_() if is_first else sum_VH)
    else:
        plain.add_product(sum_VH, left_NV, right_NH, is_first)


add_product.register_fake(_nothing)


@cache
def _torch_adds_to_float32(device, dtype):
    """Ask torch itself: the argument is there since 2.8, a float32 sum for bf16 factors later, and only on CUDA."""
    one = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(one.float(), one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


@cache
def _apex_accumulation(device):
    """Return apex' product that accumulates weight gradients, or None without that extension or a GPU."""
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
    except ImportError:
        return None


def _block(columns):
    """Return how many of a token's entries a program holds at a time."""
    return min(BLOCK, triton.next_power_of_2(max(columns, 16)))
