"""What Megatron-Core and Megatron-Bridge ask of Transformer Engine when they build, save and load a model, on a CPU.

Transformer Engine needs a GPU to be imported. This has its layers' parameters and states under their names and none of
its kernels: nothing here computes. Put the folder above on `PYTHONPATH`.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
