"""The tokenize stage: texts become token files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactlm_nemo.config.data import CorpusConfig, SpecialTokens
from compactlm_nemo.config.schema import Config
from compactlm_nemo.data.records import is_hub, missing_sources, sources_of
from compactlm_nemo.errors import DataError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.stages.generate import FILE as DOCUMENTS
from compactlm_nemo.stages.stage import Stage

if TYPE_CHECKING:
    from compactlm_nemo.data.documents import DocumentEncoder
    from compactlm_nemo.stages.context import Run


def corpus_files(config: Config) -> dict[str, Path]:
    """Return the text of every corpus, or its Megatron files, and the user's chat template."""
    template = {} if (given := config.data.chat_template) is None else {"data.chat_template": Path(given)}
    files: dict[str, Path] = {}
    for name, corpus in config.data.corpora().items():
        if corpus.generated:
            continue  # an artifact of the run
        if corpus.prefix is not None:
            files |= {f"data.{name}{end}": Path(f"{corpus.prefix}{end}") for end in (".idx", ".bin", ".mask")}
            continue
        sources = [Path(source) for source in sources_of(corpus.path) if not is_hub(source)]
        is_one = sources == [Path(path) for path in corpus.paths]
        files |= {f"data.{name}" if is_one and len(sources) == 1 else f"data.{name}:{s}": s for s in sources}
    return template | files


def data_problems(config: Config, models: list[Dims]) -> list[str]:
    """Return the broken rules between texts, budgets of tokens and the training that they are for."""
    data, problems = config.data, []
    if not (config.dry_run and config.model.architecture):
        problems += [
            f"data.{name}.path={path} does not exist; give a .jsonl file, a folder or glob of texts, a Megatron "
            "prefix, or hf://ORG/NAME for a data set of the Hub."
            for name, corpus in data.corpora().items()
            if not corpus.is_tokenised and not corpus.generated
            for path in missing_sources(corpus.path)
        ]
    if not config.dry_run:
        problems += [
            f"data.{part} is empty; give at least one text, as data.{part}.NAME=text.jsonl."
            for part in ("train", "heldout")
            if not getattr(data, part)
        ]
    if data.chat_template is not None and not config.dry_run and not Path(data.chat_template).is_file():
        problems.append(f"data.chat_template={data.chat_template} does not exist; give a Jinja file, or leave it out.")
    if data.train and not data.blend and not config.dry_run:
        problems.append("data.train has no text of a weight > 0; give at least one that training draws from.")
    problems += [
        f"data.train.{name}.weight=0 has no effect without score.data.{name}; set it, or remove the text."
        for name, corpus in data.train.items()
        if corpus.share == 0 and name not in config.score.data
    ]
    budgets = [corpus.tokens for corpus in data.train.values() if corpus.tokens is not None]
    trained = config.distill.num_samples * data.sequence_length
    if budgets and len(budgets) < len(data.blend):
        problems.append("data.train has texts with `tokens` and texts without; give every one a budget, or weights.")
    elif budgets and sum(budgets) < trained:
        problems.append(
            f"data.train has budgets of {sum(budgets):,} tokens, distill.steps x global_batch x sequence_length trains "
            f"{trained:,}; lower distill.steps or raise them."
        )
    shared = {p for c in data.train.values() for p in c.paths} & {p for c in data.heldout.values() for p in c.paths}
    return problems + [
        f"data.heldout and data.train share {path}; hold out other documents." for path in sorted(shared)
    ]


def tokenize_settings(config: Config) -> dict[str, Any]:
    """Return what decides the tokens beside the files; chats are refused that could not be told from each other."""
    data = config.data
    masks = {"mask_documents": True} if data.mask_documents else {}
    return masks | {
        "corpora": {name: [corpus.source, corpus.key] for name, corpus in sorted(data.corpora().items())},
        "special_tokens": data.special_tokens,
        "document_end": data.document_end,
    }


def tokenize(run: Run, folder: Path) -> dict[str, Any]:
    """Write token files of every corpus of texts or chats; documents end with the token `data.document_end`.

    All ranks share the work; parts of it that a killed stage had done are used again.
    """
    import shutil
    from functools import partial

    from compactlm_nemo.data.tokens import Counts, map_tokens, tokenize_corpus
    from compactlm_nemo.parallel.launch import main_rank_writes
    from compactlm_nemo.progress import byte_bar

    data, encoder = run.config.data, _encoder(run)
    parts = run.open_progress({"stage": run.stage.name}, are_independent=True)
    counts: dict[str, Counts] = {}
    refused: dict[bytes, str] = {}
    # Held-out texts come first: no text of training may be one of theirs.
    for name in sorted(data.corpora(), key=lambda name: name.startswith("train.")):
        corpus = data.corpora()[name]
        if not corpus.is_tokenised:
            is_heldout = name.startswith("heldout.")
            encodes = replace(encoder, key=corpus.key, refused={} if is_heldout else refused)
            counts[name] = tokenize_corpus(
                _source(run, corpus), folder / name, encodes,
                parts=parts / f"{_digest(run, name, corpus)}.{name}", keeps_digests=is_heldout,
                bar=partial(byte_bar, f"tokenize {name}"),
            )  # fmt: skip
            refused |= counts[name].digests
        elif encoder.new_ids is not None:
            assert corpus.prefix is not None
            with main_rank_writes() as writes:
                if writes:
                    map_tokens(corpus.prefix, folder / name, encoder)
        _check_loss(run, name, corpus)
    with main_rank_writes() as writes:
        if writes:
            shutil.rmtree(run.progress)
    counts = {name: counts[name] for name in data.corpora() if name in counts}
    answers = {name: each.answer_tokens for name, each in counts.items() if each.answer_tokens < each.tokens}
    return {
        "tokens": {name: each.tokens for name, each in counts.items()},
        "documents": {name: {"all": each.documents, **each.troubles} for name, each in counts.items()},
    } | ({"answers": answers} if answers else {})


def _source(run: Run, corpus: CorpusConfig) -> Any:
    """Return where the text of a corpus is."""
    return str(run.path("generated") / DOCUMENTS) if corpus.generated else corpus.path


def _encoder(run: Run) -> DocumentEncoder:
    """Return what turns the records of a corpus, but for its key, into tokens of the model.

    Where the vocabulary is trimmed it reads with the whole tokenizer, which shows what the model lacks of a text.
    """
    from compactlm_nemo.data.chat import read_template
    from compactlm_nemo.data.documents import DocumentEncoder
    from compactlm_nemo.data.tokenizer import check_vocabulary, end_of_text, load_tokenizer
    from compactlm_nemo.data.trimming import UNTRIMMED, TrimmedVocabulary
    from compactlm_nemo.stages.context import HF

    data, teacher = run.config.data, run.path("teacher")
    vocabulary = TrimmedVocabulary.load(teacher)
    folder = teacher / (HF if vocabulary is None else UNTRIMMED)
    vocab_size = run.dims("teacher").vocab_size if vocabulary is None else vocabulary.whole_size
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size)  # a GGUF file's is known only now
    return DocumentEncoder(
        tokenizer=tokenizer,
        eod=end_of_text(folder, data.document_end),
        vocab_size=vocab_size,
        chat_template=read_template(None if data.chat_template is None else Path(data.chat_template)),
        parses_special_tokens=data.special_tokens is SpecialTokens.parse,
        keeps_apart=data.mask_documents,
        new_ids=None if vocabulary is None else vocabulary.new_ids,
    )


def _digest(run: Run, name: str, corpus: CorpusConfig) -> str:
    """Return what names the unfinished tokens of a corpus: its files, and all that decides their tokens."""
    import hashlib
    import json

    from compactlm_nemo.artifacts import settings_of

    config = run.config
    names = [name, *(other for other in config.data.corpora() if other.startswith("heldout."))]
    files = {key: path for key, path in corpus_files(config).items() if path.is_file()}
    stamps = {
        key: [path.stat().st_size, path.stat().st_mtime_ns]
        for key, path in files.items()
        if key == "data.chat_template" or any(key.startswith(f"data.{each}") for each in names)
    }
    settings = {key: value for key, value in tokenize_settings(config).items() if key != "corpora"}
    decides = [settings_of(settings), corpus.source, corpus.key, stamps, run.fingerprint("teacher")]
    decides += [run.fingerprint("generated")] if corpus.generated else []
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


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
    summary="texts and chats -> Megatron `.bin`/`.idx` files",
    reads=("teacher",),
    may_read={"generated": lambda config: config.data.has_generated},
    writes="tokens",
    settings=tokenize_settings,
    files=corpus_files,
    problems=data_problems,
    run=tokenize,
)
