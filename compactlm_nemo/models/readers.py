"""Loads an exported folder with the tool that it was made for, and writes a digest of every weight that the tool has.

The Python that has the tool runs this file by its path, `PYTHON readers.py FORMAT FOLDER OUT`, so it imports nothing of
this package, and each tool only where that is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import Any

PACKAGES = {"hf": "transformers", "bridge": "megatron.bridge", "nemo2": "nemo.collections.llm"}
"""Format -> the package that reads it."""


def digest(tensor: Any) -> list[Any]:
    """Return what tells a tensor from another one: number format, shape, and SHA-256 of its bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy()
    return [str(plain.dtype).removeprefix("torch."), list(plain.shape), hashlib.sha256(data).hexdigest()]


def read_hf(folder: str) -> tuple[str, dict[str, Any]]:
    """Return version and weights of transformers under the names in files; in memory version 5 joins experts."""
    import transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", local_files_only=True)
    weights = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # version 4 keeps them as they are
        pass
    else:
        weights = revert_weight_conversion(model, weights)
    return f"transformers {transformers.__version__}", weights


def read_bridge(folder: str) -> tuple[str, dict[str, Any]]:
    """Return version and weights of Megatron-Bridge, which loads as its trainer and its export do."""
    from importlib.metadata import version

    from megatron.bridge.training import model_load_save

    with model_load_save.temporary_distributed_context(backend="gloo"):
        model = model_load_save.load_megatron_model(
            f"{folder}/iter_0000000", use_cpu_init=True, skip_temp_dist_context=True
        )
        part = model[0] if isinstance(model, list) else model
        weights = {name: value.clone() for name, value in _parameters(part.state_dict()).items()}
    return f"megatron-bridge {version('megatron-bridge')}", weights


def read_nemo2(folder: str) -> tuple[str, dict[str, Any]]:
    """Return version and weights of NeMo, which loads as its export does."""
    from pathlib import Path

    import nemo
    from nemo.collections import llm  # noqa: F401  (the classes that the context names)
    from nemo.lightning.io.connector import ModelConnector

    model, _ = ModelConnector(folder).nemo_load(Path(folder))
    return f"nemo-toolkit {nemo.__version__}", _parameters(model.state_dict())


def _parameters(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a model of Megatron-Core without Transformer Engine's states, grouped experts singly."""
    found = {}
    for name, value in state.items():
        if hasattr(value, "detach") and "_extra_state" not in name:
            single = re.sub(r"\.experts\.(linear_fc\d)\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
            found[re.sub(r"^(module\.)+", "", single)] = value
    return found


READERS = {"hf": read_hf, "bridge": read_bridge, "nemo2": read_nemo2}


def main(kind: str, folder: str, target: str) -> None:
    """Write tool and digests as JSON; a tool that is not there as `missing`."""
    try:
        tool, weights = READERS[kind](folder)
    except ImportError as error:
        told: dict[str, Any] = {"missing": str(error)}
    else:
        told = {"tool": tool, "weights": {name: digest(value) for name, value in weights.items()}}
    with open(target, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are no packages of the tool's
    main(*sys.argv[1:])
