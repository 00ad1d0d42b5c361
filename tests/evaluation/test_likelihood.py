"""Log-likelihoods of continuations in every layout against transformers in float64, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.errors import DataError
from compactlm_nemo.evaluation.likelihood import Pair, PairEncoder, ScoredText, log_likelihoods
from tests.support.meshes import COMBINED, EXPERT_LAYOUTS, LAYOUTS, filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CASES = ("llama", "mistral_window", "phi3_tied_longrope")
EXPERTS = ("qwen2_moe",)


def texts() -> list[ScoredText]:
    """Eleven texts of 2 to 75 tokens, on both sides of what they are filled up to and of longrope's border of 16."""
    generator = torch.Generator().manual_seed(8)
    lengths = [(2, 1), (75, 4), (17, 3), (5, 4), (33, 1), (9, 2), (34, 5), (18, 17), (33, 7), (6, 2), (70, 60)]
    return [ScoredText(torch.randint(0, VOCAB, (n,), generator=generator).tolist(), k) for n, k in lengths]


def reference(model: Any, text: ScoredText) -> float:
    """The sum of the last tokens' log-probabilities, each from the logits of the token before."""
    with torch.no_grad():
        logits = model(torch.tensor([text.ids[:-1]])).logits[0]
    total = 0.0
    for place in range(len(text.ids) - 1 - text.num_scored, len(text.ids) - 1):
        row: Tensor = logits[place]
        total += float(row[text.ids[place + 1]] - row.exp().sum().log())
    return total


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("likelihood")
    for case in CASES + EXPERTS:
        model = save_tiny(case, root / case).double()
        torch.save([reference(model, text) for text in texts()], root / case / "wanted.pt")
    return root


def _matches(rank: int, world: int, layout: dict[str, Any], cases: tuple[str, ...], root: Path) -> None:
    mesh = mesh_of(**layout)
    for case in cases:
        _, model = filled(root / case, mesh)
        wanted = torch.load(root / case / "wanted.pt")
        for batch_tokens in (1, 100):
            done: list[int] = []
            got = log_likelihoods(model, texts(), batch_tokens=batch_tokens, progress=done.append)
            assert got.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            assert not mesh.is_last_stage or sum(done) == len(wanted)


@pytest.mark.parametrize("layout", COMBINED)
def test_likelihoods_are_those_of_transformers_in_every_layout(layout, root, tmp_path):
    # One rank shows the window and the border of longrope.
    cases = CASES if layout == "1" else CASES[:1]
    run_ranks(_matches, LAYOUTS[layout][0], tmp_path, LAYOUTS[layout][1], cases, root)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_likelihoods_with_experts_are_those_of_transformers(layout, root, tmp_path):
    run_ranks(_matches, EXPERT_LAYOUTS[layout][0], tmp_path, EXPERT_LAYOUTS[layout][1], EXPERTS, root)


def encoder(start: int | None = None, max_positions: int = 100, **changes: Any) -> PairEncoder:
    """Letters, of which `ab` and ` a` are tokens of their own, and a special token."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "a", "b", "Ġ", "ab", "Ġa", "<", "s", ">"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")
    documents = DocumentEncoder(tokenizer=wrapped, eod=0, **changes)
    return PairEncoder(documents=documents, start=start, max_positions=max_positions)


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "num_scored"),
    [
        ("b", " a", [2, 5], 1),
        ("b ", "a", [2, 5], 1),  # the space goes to the continuation
        ("b \n"[:2], " a", [2, 3, 5], 2),
        ("a", "b", [4], 0),  # no token of its own
        ("ba", "bb", [2, 4, 2], 1),  # `ab` stands across the border: the context has two tokens alone
        ("", "ab", [0, 4], 1),  # behind the token that ends documents
        (" ", "b", [0, 3, 2], 2),
        ("a<s>", "b", [1, 6, 7, 8, 2], 1),  # letters, no special token
    ],
)
def test_tokens_of_a_continuation_are_those_of_the_whole_behind_the_contexts(context, continuation, ids, num_scored):
    if num_scored == 0:
        with pytest.raises(DataError, match="f.jsonl:3 has the choice 'b', which adds no token"):
            encoder().encode([Pair(context, continuation, "f.jsonl:3")])
        return
    assert encoder().encode([Pair(context, continuation, "f")]) == [ScoredText(ids, num_scored)]


def test_a_start_token_stands_in_front_once_and_long_texts_lose_their_left() -> None:
    pairs = [Pair("b", "a", "f"), Pair("<s>b", "a", "f"), Pair("bbbb", "aa", "f")]
    got = encoder(start=0, max_positions=4, parses_special_tokens=True).encode(pairs)
    assert got == [ScoredText([0, 2, 1], 1), ScoredText([0, 2, 1], 1), ScoredText([2, 2, 2, 1, 1], 2)]
    with pytest.raises(DataError, match="f:9 has a choice of 5 tokens, the model has 4 positions"):
        encoder(max_positions=4).encode([Pair("b", "aaaaa", "f:9")])
    with pytest.raises(DataError, match="f:9 gives token 5, outside the vocabulary of 5"):
        encoder(vocab_size=5).encode([Pair("b", " a", "f:9")])
