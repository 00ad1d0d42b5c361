"""The tokenize stage: texts become token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.tokens import (
    check_vocabulary,
    end_of_text,
    load_tokenizer,
    refuse_shared_documents,
    tokenize_corpus,
)
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.stages.context import HF, Run


def _corpora(config: Config) -> dict[str, Path]:
    return {
        f"data.{name}{end}": Path(corpus.path + end)
        for name, corpus in config.data.corpora().items()
        for end in ("", ".idx", ".bin")
    }


def tokenize(run: Run, folder: Path) -> dict[str, Any]:
    """Every corpus given as text -> Megatron token files; documents end with the tokenizer's end-of-text token."""
    counts: dict[str, int] = {}
    with main_rank_writes() as writes:
        if writes:
            tokenizer = load_tokenizer(run.dir / "teacher" / HF)
            check_vocabulary(tokenizer, run.dims("teacher").vocab_size)  # a GGUF file's is known only now
            end = end_of_text(run.dir / "teacher" / HF)
            refuse_shared_documents(run.config.data)
            for name, corpus in run.config.data.corpora().items():
                if run.token_prefix(name).parent == folder:
                    counts[name] = tokenize_corpus(Path(corpus.path), folder / name, tokenizer, end)
    return {"tokens": counts}
