"""The model and the tokens that both tools score: the bundled teacher under Megatron's names, and running text.

Both tools build their model in the same Megatron-Core from the same file, so no difference of theirs lies in weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ModelChunks


CACHE = Path(__file__).parents[1] / ".cache"
ASSETS = Path(__file__).parents[2] / "runs" / "assets"
VOCAB_MULTIPLE = 128
MAX_TOKENS = 2**18
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare() -> None:
    """Fetch the teacher and its text, and write `teacher.safetensors`, `dims.json`, `tokens.safetensors`, once."""
    if (CACHE / "tokens.safetensors").exists():
        return
    from compactlm_nemo.data.bundled import fetch_bundled
    from compactlm_nemo.models import gguf
    from compactlm_nemo.models.build import build_model, global_names
    from compactlm_nemo.models.hf import open_hf

    fetch_bundled(ASSETS)
    gguf.convert(ASSETS / "teacher.gguf", CACHE / "hf")
    dims, parameter = open_hf(CACHE / "hf")
    with launched(ParallelConfig(), seed=1) as mesh:
        names = [
            name
            for name, _ in global_names(build_model(dims, mesh, dtype=torch.float32, vocab_multiple=VOCAB_MULTIPLE))
        ]
    save_file({name: parameter(name).float().contiguous() for name in names}, CACHE / "teacher.safetensors")
    dims.save(CACHE / "dims.json")
    save_file({"tokens": _tokenise(CACHE / "hf", ASSETS / "wiki" / "train.jsonl")}, CACHE / "tokens.safetensors")


def _tokenise(tokenizer_folder: Path, texts: Path) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens: list[int] = []
    with texts.open() as lines:
        for line in lines:
            tokens += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            if len(tokens) >= MAX_TOKENS:
                break
    return torch.tensor(tokens[:MAX_TOKENS])


def calibration_tokens(args: argparse.Namespace) -> Tensor:
    """`[samples, sequence length]`, documents one after another."""
    tokens, wanted = load_file(CACHE / "tokens.safetensors")["tokens"], args.samples * args.sequence_length
    if wanted > len(tokens):
        raise SystemExit(f"--samples times --sequence-length is {wanted}; there are {len(tokens)} tokens.")
    return tokens[:wanted].view(args.samples, args.sequence_length)


def calibration_batches(args: argparse.Namespace) -> list[Tensor]:
    """The same tokens as the passes take them, `--micro-batch` samples at a time."""
    return list(calibration_tokens(args).split(args.micro_batch))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that the measurement and both of its processes share: what is passed through the model."""
    parser.add_argument("--samples", type=int, default=8, help="calibration samples of a pass")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples of a forward pass")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="of weights and activations")


def our_model(mesh: Mesh, dtype: torch.dtype) -> tuple[Dims, ModelChunks]:
    """The teacher as this package builds it, in evaluation mode."""
    from compactlm_nemo.models.build import build_model, fill

    dims, tensors = Dims.load(CACHE / "dims.json"), load_file(CACHE / "teacher.safetensors")
    model = build_model(dims, mesh, dtype=dtype, vocab_multiple=VOCAB_MULTIPLE)
    fill(model, tensors.__getitem__, VOCAB_MULTIPLE)
    return dims, model.eval()


if __name__ == "__main__":
    prepare()
