"""The residual stream is turned to its principal directions before hidden channels are cut.

An RMSNorm does not see a rotation of its input, so the stream x may be kept as ``x' = Q^T S x`` with Q `[H, K]`,
orthonormal columns: the directions in which the normed stream varies most. S is 1 on its own; where the output layer
is the embedding table, ``S = diag(sqrt|w_f|)`` with w_f the weight of the final norm, and the columns of Q do not mix
channels of different signs of w_f, so that the two tables can stay one:

    embedding      E' = E S Q
    writers        W' = Q^T S W
    final norm     w' = sign / kappa, so that E' (w' * norm(x')) = E S Q sign Q^T S x^ ~ E diag(w_f) x^
    readers        W' = W A,   A the least-squares map from ``z = norm(x')`` to the norm's output ``y = w * x^``

with ``x^ = x / rms(x)``. A token's z is ``Q^T S x^`` times 1 / rms(Q^T S x^), which varies little between tokens; its
mean over the tokens, kappa, replaces it, so that all comes from the stored second moments, ``M = E[x^ x^^T]``:

    A^T = A0 + (Z + D)^-1 (B - Z A0),   A0 = Q^T S^-1 diag(w) / kappa,
    Z = kappa^2 Q^T S M S Q,   B = kappa Q^T S M diag(w)

Source: SliceGPT (arXiv 2401.15024) for the rotation with untied embeddings; the rest is ours.
Shape suffixes: H hidden channels of the teacher, K of the student, O outputs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compactlm_nemo.pruning.least_squares import damped


@dataclass(frozen=True)
class Rotation:
    """A rotation of the residual stream, float64 on the CPU."""

    basis_HK: Tensor
    """Q."""
    scale_H: Tensor
    """Diagonal of S."""
    sign_K: Tensor
    """Sign of the final norm's weight in each direction; 1 with untied embeddings."""
    is_tied: bool
    """Whether the output layer is the embedding table."""
    energy_H: Tensor
    """Energy of the stream in all H directions, the kept ones first; the energy of the others is lost."""

    def gain(self, normed_HH: Tensor) -> float:
        """Return kappa: 1 / rms of ``Q^T S x^`` over channels and tokens; `normed_HH` is M."""
        turned = self._turned(normed_HH)
        return float(turned.diagonal().mean().rsqrt())

    def _turned(self, normed_HH: Tensor) -> Tensor:
        half_HK = self.scale_H[:, None] * self.basis_HK
        return half_HK.T @ normed_HH @ half_HK

    def read(self, normed_HH: Tensor, norm_H: Tensor, ridge: float) -> Tensor:
        """Fit ``A``, `[H, K]`: from the student's normed stream to the teacher's norm of weight `norm_H`."""
        kappa = self.gain(normed_HH)
        gram_KK = kappa**2 * self._turned(normed_HH)
        half_HK = self.scale_H[:, None] * self.basis_HK
        cross_KH = kappa * (half_HK.T @ normed_HH) * norm_H.double()
        start_KH = (self.basis_HK / self.scale_H[:, None]).T * norm_H.double() / kappa
        better_KH = torch.linalg.solve(damped(gram_KK, ridge), cross_KH - gram_KK @ start_KH)
        return (start_KH + better_KH).T


def normed_moment(moment_HH: Tensor, tokens: int, norm_H: Tensor) -> Tensor:
    """Compute ``M = E[x^ x^^T]`` float64 from the summed second moments of the norm's output ``w * x^``.

    A channel whose weight is 0 is 0 in the output and counts as silent.
    """
    inverse_H = torch.where(norm_H == 0, 0.0, 1 / norm_H.double())
    return moment_HH.double() / tokens * inverse_H * inverse_H[:, None]


def principal_rotation(normed_HH: Tensor, final_norm_H: Tensor | None, num: int) -> Rotation:
    """Find the `num` directions that hold most of the stream.

    Args:
        normed_HH: Sum of M over all norms.
        final_norm_H: w_f when the output layer is the embedding table, else None.
    """
    scale_H = torch.ones(len(normed_HH), dtype=torch.float64)
    sign_H = torch.ones_like(scale_H)
    if final_norm_H is not None:
        magnitude_H = final_norm_H.double().abs()
        scale_H = magnitude_H.clamp(min=1e-3 * float(magnitude_H.mean())).sqrt()
        sign_H = torch.where(final_norm_H < 0, -1.0, 1.0).double()
    parts = [_directions(normed_HH * scale_H * scale_H[:, None], sign_H, sign) for sign in (1.0, -1.0)]
    values, vectors = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
    signs = torch.cat([torch.full_like(value, sign) for (value, _), sign in zip(parts, (1.0, -1.0), strict=True)])
    best = values.argsort(descending=True, stable=True)
    return Rotation(vectors[:, best[:num]], scale_H, signs[best[:num]], final_norm_H is not None, values[best])


def _directions(weighted_HH: Tensor, sign_H: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Compute energies `[n]` and principal directions `[H, n]` of the n channels of one sign."""
    channels = (sign_H == sign).nonzero().flatten()
    values, vectors = torch.linalg.eigh(weighted_HH[channels][:, channels])
    whole = torch.zeros(len(sign_H), len(channels), dtype=torch.float64)
    # A direction and its opposite are equivalent: the largest entry is made positive, so that every library agrees.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)) if len(channels) else vectors
    whole[channels] = vectors * largest.sign()
    return values, whole
