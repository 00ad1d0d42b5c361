"""A process that loads one model and generates when it is told to: `python -m compactlm_nemo.evaluation.generating`.

A line of JSON on its standard input, ``{"prompts": [[token, ...], ...], "new_tokens": N}``, is answered with one on its
standard output: the seconds to the first token of all prompts and of the steps after it, the tokens that came back for
each prompt, and the peak of memory so far. What libraries print goes to its standard error. It ends with its input, so
no such process outlives the one that asks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = tuple[float, float, list[int]]
"""Seconds to the first token of every prompt, seconds of the other tokens, tokens that came back for each prompt."""
Generate = Callable[[list[list[int]], int], Answer]
"""Function of prompts of equal length and of the number of tokens to generate."""
Peak = Callable[[], int | None]
"""Function that tells the most bytes of memory so far, above what the process held before it loaded the model."""

VLLM_SHARE = 0.45
"""Share of the device's memory that vLLM reserves: two models stand on it at once."""


def transformers_engine(asked: dict[str, Any]) -> tuple[Generate, Peak]:
    """Load the model with transformers; it generates greedily, and no token ends an answer early."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    only_here: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with torch.device("meta"):  # brings the model's code, which is no memory of its weights
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked["folder"], **only_here))
    peak_bytes = _memory_meter()
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, asked["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=dtype, **only_here)
    model.to(on).eval()

    class FirstToken(StoppingCriteria):
        """Notes when the first token was there, and stops nothing."""

        at: float | None = None

        def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
            if self.at is None:
                _wait()
                self.at = time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> Answer:
        tokens_BS, first = torch.tensor(prompts, device=on), FirstToken()
        # The folder's own settings, an end of text or samples for example, would be taken where these say nothing.
        model.generation_config = GenerationConfig(
            do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, use_cache=True, pad_token_id=0
        )
        _wait()
        start = time.perf_counter()
        found = model.generate(
            tokens_BS, attention_mask=torch.ones_like(tokens_BS), stopping_criteria=StoppingCriteriaList([first])
        )
        _wait()
        end = time.perf_counter()
        assert first.at is not None
        return first.at - start, end - first.at, [len(row) - tokens_BS.shape[1] for row in found]

    return generate, peak_bytes


def vllm_engine(asked: dict[str, Any]) -> tuple[Generate, Peak]:
    """Load the model with vLLM; all prompts arrive at once, and each call reads them anew.

    Its peak of memory is not told: vLLM reserves a share of the device whatever the model.
    """
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=asked["folder"],
            dtype=asked["dtype"],
            max_model_len=asked["length"],
            max_num_seqs=asked["batch"],
            enable_prefix_caching=False,
            gpu_memory_utilization=VLLM_SHARE,
            skip_tokenizer_init=True,
            trust_remote_code=False,
        )
    )
    calls = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> Answer:
        nonlocal calls
        calls += 1
        wanted = SamplingParams(
            temperature=0.0, min_tokens=new_tokens, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        counts = {f"{calls}-{i}": 0 for i in range(len(prompts))}
        start, first = time.perf_counter(), None
        for name, prompt in zip(counts, prompts, strict=True):
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), wanted)
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and all(counts.values()):
                first = time.perf_counter()
        end = time.perf_counter()
        assert first is not None
        return first - start, end - first, list(counts.values())

    return generate, lambda: None


ENGINES: dict[str, Callable[[dict[str, Any]], tuple[Generate, Peak]]] = {
    "transformers": transformers_engine,
    "vllm": vllm_engine,
}


def _wait() -> None:
    """Wait until the device has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status_bytes(name: str) -> int:
    """Return a size of this process, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _memory_meter() -> Peak:
    """Return a function that tells the peak of memory from now on, above what the process holds now.

    On a GPU that is what torch allocates there, on a CPU resident memory.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmRSS")
    return lambda: _status_bytes("VmHWM") - before


def main(words: str) -> None:
    """Load the model that is asked for, say so, and generate until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(words)

    import torch

    from compactlm_nemo.parallel.devices import device_kind

    torch.set_num_threads(asked["threads"])
    version = __import__(asked["engine"]).__version__
    generate, peak_bytes = ENGINES[asked["engine"]](asked)
    about = {"device": device_kind(), "version": version, "threads": torch.get_num_threads()}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        told = json.loads(line)
        first, decode, counts = generate(told["prompts"], told["new_tokens"])
        answer = {"first_seconds": first, "decode_seconds": decode, "counts": counts, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
