"""Model-Optimizer's cuts of the bundled teacher and their losses, as one JSON line. Runs in its environment.

python -m bench.pruning.minitron_prune TOKENS.safetensors '{"heads 6": {"num_attention_heads": 6}}'
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.common.minitron import lm_loss, prune, shipped_model
from bench.common.teacher import CACHE
from bench.common.worker import answers_only
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.launch import launched

MICRO_BATCH = 4


def main() -> None:
    answers = answers_only()
    tokens, targets = load_file(sys.argv[1]), json.loads(sys.argv[2])
    calibration, vocab_size = tokens.pop("calibration").split(MICRO_BATCH), Dims.load(CACHE / "dims.json").vocab_size
    losses: dict[str, dict[str, float]] = {}
    with launched(ParallelConfig(), seed=1) as mesh, tempfile.TemporaryDirectory() as folder:

        def forward_loop(model: torch.nn.Module) -> None:
            forward_each(teacher.wrapped([model]), list(calibration), lambda *_: None)

        for target, sizes in targets.items():
            teacher = shipped_model(mesh, torch.float32)
            model = prune(teacher[0], sizes, forward_loop, Path(folder) / "scores.pt")
            chunks = teacher.wrapped([model]).eval()
            losses[target] = {
                text: lm_loss(chunks, mesh, list(windows.split(MICRO_BATCH)), vocab_size)
                for text, windows in sorted(tokens.items(), reverse=True)
            }
    answers.write(json.dumps(losses) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
