"""Kernels that are imported, so that a config may ask for them, and never called here."""


def _kernel(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("this stands in for Transformer Engine where nothing is computed")


moe_permute = moe_permute_with_probs = moe_unpermute = _kernel
moe_sort_chunks_by_index = moe_sort_chunks_by_index_with_probs = _kernel
