"""CompactLM-NeMo: prune a pretrained language model by measured importance and distil it from the original."""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns once for every optional library that is absent; none of it is of use to a user of this package.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Calls that Megatron-Core makes to names that newer versions of torch call by others; the host layer forwards some.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|compactlm_nemo\.parallel\.host")
