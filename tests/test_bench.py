"""The measurements tell how they are used, and compare equal things; what they measure is up to the machine."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from bench.distill.head import WAYS, Subject
from tests.support import commands


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("importance", "--samples"),
        ("pruning.pairs", "--samples"),
        ("pruning", "--seeds"),
        ("distill.linear_kd", "--tokens"),
        ("distill.distill_step", "--repeats"),
        ("distill.orderings", "--steps"),
        ("distill.recovery", "--rates"),
    ],
)
def test_help(name: str, option: str) -> None:
    done = commands.run(["-m", f"bench.{name}", "--help"])
    assert done.returncode == 0, done.stderr
    assert f"python -m bench.{name}" in done.stdout and option in done.stdout


def test_our_head_and_the_plain_one_compute_the_same() -> None:
    plain, ours = (Subject(WAYS[way](), hidden=16, vocab=50).once(tokens=10) for way in ("plain torch", "ours"))
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
