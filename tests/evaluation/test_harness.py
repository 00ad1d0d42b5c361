"""lm-eval on an exported folder against log-likelihoods computed here with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from compactlm_nemo.config.evaluate import EvaluateConfig
from compactlm_nemo.config.load import compose
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.evaluation.harness import run_tasks
from compactlm_nemo.workflow.runner import run_stages
from tests.support.tiny_run import TASK, command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    words = ["<|endoftext|>", "<unk>", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0], unk_token=words[1]).save_pretrained(
        tmp_path / "hf"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(words)}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.5, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_accuracy_is_the_share_of_likeliest_answers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(5)
    documents, correct = [], 0
    for i in range(24):
        question = torch.randint(2, 42, (5,), generator=generator)
        choices = torch.randperm(40, generator=generator)[:3] + 2
        with torch.no_grad():
            best = int(model(question[None]).logits[0, -1, choices].argmax())
        answer = i % 3
        correct += best == answer
        texts = [f"w{c - 2}" for c in choices.tolist()]
        documents.append({"question": " ".join(f"w{q - 2}" for q in question), "choices": texts, "answer": answer})
    (tmp_path / "data.json").write_text("\n".join(json.dumps(document) for document in documents))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    got = run_tasks(folder, EvaluateConfig(tasks=["own_choice"], task_folder=str(tasks)))
    assert 0 < correct < 24
    assert got == {"own_choice/acc": pytest.approx(correct / 24)}


def test_a_missing_task_folder_is_told_before_anything_runs() -> None:
    overrides = ["experiment=llama31_8b_to_4b_width", "dry_run=true", "model.source=absent"]
    with pytest.raises(ConfigError, match="evaluate.task_folder=nowhere"):
        run_stages(compose([*overrides, "evaluate.tasks=[arc_easy]", "evaluate.task_folder=nowhere"]))


def test_tasks_that_nobody_knows_are_told_before_anything_runs(inputs: Path, tmp_path: Path) -> None:
    tasks = ["evaluate.tasks=[own_choice,nope,arc_easy]", f"evaluate.task_folder={inputs}/tasks", "dry_run=true"]
    _, _, *words = command(inputs, tmp_path / "run", *tasks)
    with pytest.raises(ConfigError, match="evaluate.tasks: lm-eval knows no nope; "):
        run_stages(compose(words))
