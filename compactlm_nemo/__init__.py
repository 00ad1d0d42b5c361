"""CompactLM-NeMo: prune a pretrained language model by measured importance and distil it from the original."""

import warnings
from typing import Any

__version__ = "0.1.0"

# Megatron-Core warns once for every optional library that is absent; none of it is of use to a user of this package.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Calls that Megatron-Core makes to names that newer versions of torch call by others; the host layer forwards some.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|compactlm_nemo\.parallel\.host")


def __getattr__(name: str) -> Any:
    """Return the door for Python when it is first asked for: `import compactlm_nemo` alone imports nothing."""
    if name != "Compression":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from compactlm_nemo.workflow.compression import Compression

    return Compression
