"""Which document a target belongs to, and how frequent tokens are, against loops over the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compactlm_nemo.data.answer_mask import AnswerMaskWriter
from compactlm_nemo.data.windows import Corpus, heldout_documents, heldout_windows, token_counts
from tests.data.test_data import write_stream

END, LENGTH, TOKENS = 0, 7, 60


def stream(seed: int, tokens: int = TOKENS) -> list[int]:
    return [int(x) for x in torch.randint(0, 6, (tokens,), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_document_ends_with_its_last_token(is_masked: bool, bos: int | None, tmp_path: Path) -> None:
    ids = stream(3)
    prefix = write_stream(tmp_path / "a", ids)
    starts = range(0, TOKENS - LENGTH, LENGTH)
    if is_masked:  # windows 1 and 2 have no answer, and are passed over
        flags = [not LENGTH < place <= 3 * LENGTH for place in range(TOKENS)]
        writer = AnswerMaskWriter(Path(f"{prefix}.mask"))
        writer.add(TOKENS, flags)
        writer.close()
        starts = [start for start in starts if start not in (LENGTH, 2 * LENGTH)]
    windows_WT = heldout_windows(prefix, LENGTH, 5 * LENGTH, bos=bos)
    want = [[ids[: start + 1 + place].count(END) for place in range(LENGTH)] for start in list(starts)[:5]]
    assert heldout_documents(prefix, LENGTH, len(windows_WT), document_end=END).tolist() == want
    assert len({number for row in want for number in row}) > 3


def test_frequencies_are_shares_of_the_blend(tmp_path: Path) -> None:
    first, second = stream(1), stream(2, 30)
    corpora = [Corpus(write_stream(tmp_path / "a", first), 3.0), Corpus(write_stream(tmp_path / "b", second), 1.0)]
    want = [(3 * first[:40].count(v) / 40 + second.count(v) / 30) / 4 for v in range(8)]
    assert token_counts(corpora, 8, most_tokens=40).tolist() == pytest.approx(want, rel=1e-12)
