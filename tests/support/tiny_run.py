"""A run that takes seconds: a tiny random Llama with a word-level tokenizer, texts, and a command line for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TASK = """\
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


WORDS = [f"w{i}" for i in range(90)]


def make_inputs(folder: Path) -> Path:
    """Write `teacher/`, `train.jsonl`, `test.jsonl` and an lm-eval task into the folder."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 93}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>").save_pretrained(
        folder / "teacher"
    )
    generator = torch.Generator().manual_seed(1)
    for name, count in (("train", 60), ("test", 10)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                words = torch.randint(0, len(WORDS), (40,), generator=generator).tolist()
                file.write(json.dumps({"text": " ".join(WORDS[i] for i in words)}) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(TASK.format(data=folder / "task.json"))
    document = {"question": "w1 w2", "choices": ["w3", "w4"], "answer": 1}
    (folder / "task.json").write_text(json.dumps(document) + "\n")
    return folder


def command(inputs: Path, run: Path, *overrides: str, recipe: str = "compress") -> list[str]:
    """Arguments of python for a run of a recipe on the inputs."""
    return [
        "-m", f"recipes.{recipe}", f"run.dir={run}", f"model.source={inputs}/teacher",
        f"data.train.a={inputs}/train.jsonl", f"data.heldout.a={inputs}/test.jsonl",
        "data.sequence_length=16", "score.samples=8", "search.ffn=[32]", "search.layers=[2]", "search.heads=[2]",
        "search.hidden=[24]", "distill.steps=6", "distill.global_batch=4", "distill.micro_batch=2",
        "distill.checkpoint_every=2", "distill.lr=1e-3", "evaluate.tokens=64", *overrides,
    ]  # fmt: skip


def metrics(run: Path, stage: str = "distill") -> list[dict[str, float]]:
    """What a run's training logged at each step, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
