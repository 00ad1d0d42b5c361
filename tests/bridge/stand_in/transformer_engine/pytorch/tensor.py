"""Kinds of tensors of fp8, of which no weight here is one."""


class QuantizedTensor:
    """A class to ask for."""
