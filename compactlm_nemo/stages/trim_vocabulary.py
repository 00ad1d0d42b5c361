"""Trims the teacher's vocabulary while it is imported: texts -> kept tokens -> small files and rows of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from compactlm_nemo.data.chat import read_template
from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.data.records import read_pieces, sources_of, total_bytes
from compactlm_nemo.data.tokenizer import end_of_text, load_tokenizer
from compactlm_nemo.data.trimming import (
    UNTRIMMED,
    TrimmedVocabulary,
    kept_ids,
    other_place,
    trim_problem,
    trimmed,
    used_ids,
)
from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.families import EMBEDDING, OUTPUT_LAYER
from compactlm_nemo.models.hf_assets import config_token_ids, copy_hf_assets, trim_hf_assets
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.launch import main_rank_writes
from compactlm_nemo.progress import byte_bar

if TYPE_CHECKING:
    import torch

    from compactlm_nemo.config.schema import Config
    from compactlm_nemo.models.build import ParameterSource
    from compactlm_nemo.stages.context import Run


def trim_vocabulary(run: Run, folder: Path, hf_assets: Path, whole_size: int) -> TrimmedVocabulary | None:
    """Make the copy `hf_assets` of the teacher's small files that of a trimmed vocabulary. Collective.

    The files as they were, and the vocabulary, are kept in the teacher's artifact, `folder`: the tokenize stage reads
    texts with the whole tokenizer, so that it sees what the trimmed one lacks.

    Returns:
        The tokens that stay; None where `model.vocab_texts` asks for all.
    Raises:
        CheckpointError: the tokenizer cannot be trimmed, or would split the texts otherwise.
    """
    if run.config.model.vocab_texts is None:
        return None
    vocabulary: TrimmedVocabulary | None = None
    with main_rank_writes() as writes:
        if writes:
            vocabulary = _trim(run.config, folder, hf_assets, whole_size)
            vocabulary.save(folder)
    return broadcast_object(vocabulary)


def _trim(config: Config, folder: Path, hf_assets: Path, whole_size: int) -> TrimmedVocabulary:
    if problem := trim_problem(hf_assets):
        raise CheckpointError(problem)
    copy_hf_assets(hf_assets, folder / UNTRIMMED)
    content = json.loads((hf_assets / "tokenizer.json").read_text(encoding="utf-8"))
    encoder = text_encoder(config, folder / UNTRIMMED, whole_size)
    texts = config.model.vocab_texts
    sources = sources_of(texts.path)
    with byte_bar("trim the vocabulary", total_bytes(sources)) as advance:
        used = used_ids(encoder, read_pieces(sources, texts.key, advance=advance))
    used |= {*config_token_ids(hf_assets), *encoder.tokenizer.all_special_ids}
    templates = [encoder.tokenizer.chat_template, encoder.chat_template]
    kept = kept_ids(content, used, "\n".join(map(str, templates)))
    vocabulary = TrimmedVocabulary(ids=kept, whole_size=whole_size)
    trim_hf_assets(hf_assets, vocabulary.new_ids, trimmed(content, kept))
    after = text_encoder(config, hf_assets, len(vocabulary.rows))
    for piece in read_pieces(sources, texts.key, lambda place: place[1] == 0):
        if place := other_place(encoder, after, vocabulary.new_ids, piece):
            raise CheckpointError(
                f"model.vocab_texts: the trimmed tokenizer splits {place} otherwise than the whole one; this tokenizer "
                "cannot be trimmed: leave vocab_texts out."
            )
    return vocabulary


def text_encoder(config: Config, folder: Path, vocab_size: int) -> DocumentEncoder:
    """Return what turns the records of `model.vocab_texts` into tokens, with the tokenizer of a folder."""
    template = config.data.chat_template
    return DocumentEncoder(
        tokenizer=load_tokenizer(folder),
        eod=end_of_text(folder, config.data.document_end),
        vocab_size=vocab_size,
        key=config.model.vocab_texts.key,
        chat_template=read_template(None if template is None else Path(template)),
    )


def kept_rows(source: ParameterSource, vocabulary: TrimmedVocabulary) -> ParameterSource:
    """Return a source whose table and output layer have the rows of the kept tokens alone, in their order."""

    def trimmed_source(name: str) -> torch.Tensor:
        full = source(name)
        return full[vocabulary.rows] if name in (EMBEDDING, OUTPUT_LAYER) else full

    return trimmed_source
