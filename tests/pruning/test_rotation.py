"""The turned residual stream: exact where theory says so, least squares elsewhere."""

from __future__ import annotations

import numpy
import torch

from compactlm_nemo.pruning.rotation import normed_moment, principal_rotation

TOKENS, H, K = 80, 10, 6


def normed_stream(seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """``x / rms(x)`` of a stream with a few strong directions, and a norm weight."""
    rng = numpy.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, H)) * numpy.linspace(0.2, 3, H) @ rng.normal(size=(H, H))
    return x / numpy.sqrt((x**2).mean(axis=1, keepdims=True)), rng.normal(1, 0.3, size=H)


def test_moments_before_the_norms_weight():
    normed, weight = normed_stream()
    weight[3] = 0
    y = normed * weight
    got = normed_moment(torch.from_numpy(y.T @ y), TOKENS, torch.from_numpy(weight)).numpy()
    want = normed.T @ normed / TOKENS
    want[3] = want[:, 3] = 0
    numpy.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_directions_hold_the_most_energy_and_keep_signs_apart():
    normed, _ = normed_stream()
    final = numpy.random.default_rng(4).normal(1, 0.2, size=H)
    final[[1, 5]] *= -1
    moment = normed.T @ normed / TOKENS
    rotation = principal_rotation(torch.from_numpy(moment), torch.from_numpy(final), K)
    basis = rotation.basis_HK.numpy()
    numpy.testing.assert_allclose(basis.T @ basis, numpy.eye(K), atol=1e-12)
    numpy.testing.assert_allclose(rotation.scale_H.numpy() ** 2, numpy.abs(final), rtol=1e-12)
    for column, sign in zip(basis.T, rotation.sign_K.numpy(), strict=True):
        assert (column[numpy.sign(final) != sign] == 0).all()
    # Of each sign's own space the directions are those of its largest variances.
    scaled = normed * numpy.sqrt(numpy.abs(final))
    energies = []
    for sign in (1, -1):
        mine = numpy.sign(final) == sign
        energies += (numpy.linalg.svd(scaled[:, mine], compute_uv=False) ** 2 / TOKENS).tolist()
    numpy.testing.assert_allclose(rotation.energy_H.numpy(), sorted(energies, reverse=True), rtol=1e-9, atol=1e-12)
    kept = ((scaled @ basis) ** 2).sum() / TOKENS
    numpy.testing.assert_allclose(kept, rotation.energy_H[:K].sum(), rtol=1e-9)


def test_without_a_shared_table_nothing_is_scaled():
    normed, _ = normed_stream()
    rotation = principal_rotation(torch.from_numpy(normed.T @ normed), None, K)
    assert torch.equal(rotation.scale_H, torch.ones(H).double()) and torch.equal(
        rotation.sign_K, torch.ones(K).double()
    )
    assert not rotation.is_tied


def test_readers_are_least_squares_on_the_turned_tokens():
    normed, weight = normed_stream()
    final = numpy.random.default_rng(4).normal(1, 0.2, size=H)
    moment = torch.from_numpy(normed.T @ normed / TOKENS)
    rotation = principal_rotation(moment, torch.from_numpy(final), K)
    turned = normed * rotation.scale_H.numpy() @ rotation.basis_HK.numpy()
    kappa = 1 / numpy.sqrt((turned**2).mean())
    assert abs(rotation.gain(moment) - kappa) < 1e-12
    z, y = kappa * turned, normed * weight
    ridge = 1e-3
    start = (rotation.basis_HK.numpy() / numpy.sqrt(numpy.abs(final))[:, None] * weight[:, None]).T / kappa
    damping = numpy.sqrt(ridge * (z**2).sum(axis=0).mean())
    rows = numpy.vstack([z, damping * numpy.eye(K)])
    want = numpy.linalg.lstsq(rows, numpy.vstack([y, damping * start]), rcond=None)[0].T
    got = rotation.read(moment, torch.from_numpy(weight), ridge).numpy()
    numpy.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
