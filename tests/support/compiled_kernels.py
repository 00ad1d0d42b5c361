"""Compiles the kernels of losses/kernels.py for a GPU that need not be there, and prints what each of them takes.

    python -m tests.support.compiled_kernels

One JSON object a line: kernel, losses, compute capability, registers a thread, bytes of shared memory, bytes spilled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)
"""A100 and H100."""
COLUMNS = 128256


def variants(kernels: Any) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yields kernels with their compile-time values: the forward KL alone, every loss at T, and without a teacher."""
    four = ("FORWARD", "REVERSE", "MSE", "COSINE")
    six = (*four, "JSD", "SKEWED")
    forward, every = {"TEACHER": True, "AT_ONE": True}, {"TEACHER": True, "AT_ONE": False}
    yield kernels._statistics, "forward_kl", dict.fromkeys(four, False) | forward | {"FORWARD": True}
    yield kernels._statistics, "every", dict.fromkeys(four, True) | every
    yield kernels._statistics, "cross_entropy", dict.fromkeys(four, False) | {"TEACHER": False, "AT_ONE": True}
    yield kernels._mixtures, "every", {"JSD": True, "SKEWED": True}
    yield kernels._gradient, "forward_kl", dict.fromkeys(six, False) | {"TEACHER": True, "CE": False, "FORWARD": True}
    yield kernels._gradient, "every", dict.fromkeys(six, True) | {"TEACHER": True, "CE": True}
    yield kernels._gradient, "cross_entropy", dict.fromkeys(six, False) | {"TEACHER": False, "CE": True}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, options: dict[str, Any]) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"student_NV": "*bf16", "teacher_NV": "*bf16", "label_N": "*i64"}
    types |= dict.fromkeys(("out_NS", "shift_NC", "coefficient_NC"), "*fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget("cuda", capability, 32)
    program = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "shared": numbers["SHARED"] + program.metadata.shared,
        "spilled": numbers["STACK"] + numbers["LOCAL"],
    }


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    from compactlm_nemo.losses import kernels

    for capability in CAPABILITIES:
        for kernel, losses, constants in variants(kernels):
            constants = {**constants, "V": COLUMNS, "B": kernels.BLOCK}
            usage = compiled(kernel, constants, capability, kernels.OPTIONS)
            print(json.dumps({"kernel": kernel.__name__, "losses": losses, "capability": capability, **usage}))


if __name__ == "__main__":
    main()
