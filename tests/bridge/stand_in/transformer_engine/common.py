"""Recipes of fp8, which no test uses."""

from types import SimpleNamespace


class DelayedScaling:
    """A class to inherit from."""


recipe = SimpleNamespace(DelayedScaling=DelayedScaling, Recipe=DelayedScaling, Format=SimpleNamespace())
