"""The commands of docs/chats.md run as they stand, on a tiny model and files like those of the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF
from tests.support import commands
from tests.support.tiny_run import WORDS

PAGE = (CONF.parent / "docs" / "chats.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
SMALL = [
    "data.sequence_length=16", "score.samples=4", "prune.samples=4", "distill.steps=2", "distill.global_batch=2",
    "evaluate.tokens=32",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'assistant' else 'w0' }} {{ m.content }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


@pytest.fixture(scope="module")
def files(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands name, whose words are the tiny model's."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(inputs / "teacher", folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "template.jinja").write_text(TEMPLATE)
    words, turn = " ".join(WORDS[:9]), " ".join(WORDS[9:12])
    chat = [{"role": "user", "content": words}, {"role": "assistant", "content": turn}]
    records = [
        {"messages": chat * 2}, {"messages": chat, "tools": [{"type": "function", "function": {"name": "clock"}}]},
        {"prompt": words, "completion": turn}, {"prompt": chat[:1], "completion": chat[1:]}, {"text": words},
    ]  # fmt: skip
    for name in ("chats", "test"):
        lines = [json.dumps(record | {"name": f"{name}{i}"}) for i in range(12) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines).replace("w3", "w4" if name == "test" else "w3"))
    shutil.copyfile(inputs / "train.jsonl", folder / "web.jsonl")
    return folder


def test_the_page_shows_each_kind_of_record() -> None:
    [block] = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    kinds = [tuple(json.loads(line)) for line in block.splitlines()]
    prompts = [("prompt", "completion")] * 2
    assert kinds == [("messages",), ("messages", "tools"), *prompts, ("text",)]


@pytest.mark.proves("stages", ["tokenize", "score", "prune", "distill", "evaluate"], "chats and prompts", "read")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_command_of_the_page_runs(block: str, files: Path, tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    text = block.replace("\\\n", " ").replace("/models/chat", f"{files}/chat").replace("runs/", f"{tmp_path}/runs/")
    for name in ("chats.jsonl", "test.jsonl", "web.jsonl", "template.jinja"):
        text = re.sub(rf"(?<=[=\s]){name}", f"{files}/{name}", text)
    python, *words = shlex.split(text)
    assert python == "python"
    done = commands.run([*words, *SMALL])
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    answers = json.loads((run / "tokens" / "manifest.json").read_text())["results"]["answers"]
    counted = json.loads((run / "evaluate" / "results.json").read_text())[0]["tokens_test"]
    assert 0 < answers["train.chats"] and 0 < counted < 32
