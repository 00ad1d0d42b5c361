"""The tokenize stage: texts become token files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.data import CorpusConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import DataError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.stages.context import Run


def corpus_files(config: Config) -> dict[str, Path]:
    """Return the text of every corpus, or its Megatron files, and the user's chat template."""
    template = {} if (given := config.data.chat_template) is None else {"data.chat_template": Path(given)}
    return template | {
        f"data.{name}{end}": Path(corpus.path + end)
        for name, corpus in config.data.corpora().items()
        for end in ("", ".idx", ".bin", ".mask")
    }


def data_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return the broken rules between texts, budgets of tokens and the training that they are for."""
    data, problems = config.data, []
    if not (config.dry_run and config.model.architecture):
        problems += [
            f"data.{name}.path={corpus.path} does not exist; give a .jsonl file or a Megatron prefix."
            for name, corpus in data.corpora().items()
            if not Path(corpus.path).is_file() and not corpus.is_tokenised
        ]
    if not config.dry_run:
        problems += [
            f"data.{part} is empty; give at least one text, as data.{part}.NAME=text.jsonl."
            for part in ("train", "heldout")
            if not getattr(data, part)
        ]
    if data.chat_template is not None and not config.dry_run and not Path(data.chat_template).is_file():
        problems.append(f"data.chat_template={data.chat_template} does not exist; give a Jinja file, or leave it out.")
    budgets = [corpus.tokens for corpus in data.train.values() if corpus.tokens is not None]
    trained = config.distill.num_samples * data.sequence_length
    if budgets and len(budgets) < len(data.train):
        problems.append("data.train has texts with `tokens` and texts without; give every one a budget, or weights.")
    elif budgets and sum(budgets) < trained:
        problems.append(
            f"data.train has budgets of {sum(budgets):,} tokens, distill.steps x global_batch x sequence_length trains "
            f"{trained:,}; lower distill.steps or raise them."
        )
    shared = {c.path for c in data.train.values()} & {c.path for c in data.heldout.values()}
    return problems + [
        f"data.heldout and data.train share {path}; hold out other documents." for path in sorted(shared)
    ]


def tokenize_settings(config: Config) -> dict[str, Any]:
    """Return what decides the tokens beside the files; chats are refused that could not be told from each other."""
    given = {"mask_documents": config.data.mask_documents, "chat_template": config.data.chat_template}
    return {"corpora": sorted(config.data.corpora())} | {name: value for name, value in given.items() if value}


def tokenize(run: Run, folder: Path) -> dict[str, Any]:
    """Write token files of every corpus of texts or chats; documents end with the tokenizer's end-of-text token."""
    from compactlm_nemo.data.chat import read_template
    from compactlm_nemo.data.tokenizer import check_vocabulary, end_of_text, load_tokenizer
    from compactlm_nemo.data.tokens import Counts, refuse_shared_documents, tokenize_corpus
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.stages.context import HF

    counts: dict[str, Counts] = {}
    with main_rank_writes() as writes:
        if writes:
            tokenizer = load_tokenizer(run.path("teacher") / HF)
            vocab_size = run.dims("teacher").vocab_size
            check_vocabulary(tokenizer, vocab_size)  # a GGUF file's is known only now
            end = end_of_text(run.path("teacher") / HF)
            template = read_template(None if (given := run.config.data.chat_template) is None else Path(given))
            refuse_shared_documents(run.config.data)
            for name, corpus in run.config.data.corpora().items():
                if run.token_prefix(name).parent == folder:
                    counts[name] = tokenize_corpus(
                        Path(corpus.path), folder / name, tokenizer, end, vocab_size,
                        chat_template=template, keeps_apart=run.config.data.mask_documents,
                    )  # fmt: skip
                _check_loss(run, name, corpus)
    answers = {name: each.answer_tokens for name, each in counts.items() if each.answer_tokens < each.tokens}
    return {"tokens": {name: each.tokens for name, each in counts.items()}} | ({"answers": answers} if answers else {})


def _check_loss(run: Run, name: str, corpus: CorpusConfig) -> None:
    """Refuse a choice of what counts in a corpus that has no answers to tell from the rest."""
    from compactlm_nemo.data.answer_mask import SUFFIX

    if corpus.loss is not None and not Path(f"{run.token_prefix(name)}{SUFFIX}").is_file():
        raise DataError(
            f"data.{name}.loss={corpus.loss.name} needs chats or prompts with completions, {corpus.path} is plain "
            "text, which counts whole; leave loss out."
        )


STAGE = Stage(
    name="tokenize",
    summary="JSON-lines texts and chats -> Megatron `.bin`/`.idx` files",
    reads=("teacher",),
    writes="tokens",
    settings=tokenize_settings,
    files=corpus_files,
    problems=data_problems,
    run=tokenize,
)
