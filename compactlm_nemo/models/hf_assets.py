"""The small files of a Hugging Face folder: which travel from import to export, and how an export's are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactlm_nemo.errors import CheckpointError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.outside import companion

SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Files with config, tokenizer, templates and settings of generation."""
PAPERS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
"""How the names of files begin that a licence asks to pass on."""
FOLDERS = ("additional_chat_templates",)
CARD = "README.md"
INDEX = "model.safetensors.index.json"
"""Which tensor is in which file."""
OF_THE_FILES = (
    ".index.json",
    "trainer_state.json",
    "training_args.json",
    "adapter_config.json",
    "_results.json",
    "card.json",
)
"""How names end that tell of the weights' files or of a training, and so of nothing that a student has."""
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tekken.json")
"""Files, beside `*.model` and `*.tiktoken`, with the vocabulary that tokenizer.json has too."""
LARGEST = 256 * 2**20
"""Bytes of a file that travels; the largest tokenizers have a tenth."""

_WITH_IDS = ("config.json", "generation_config.json")


def assets_of(folder: Path) -> dict[str, Path]:
    """Return the files that travel with a model, by name: all small ones that are neither weights nor code."""
    candidates = [folder / "config.json", *sorted(folder.glob("*"))]
    candidates += [path for name in FOLDERS for path in sorted((folder / name).glob("*.jinja"))]
    files = {str(path.relative_to(folder)): path for path in candidates if path.is_file()}
    return {name: path for name, path in files.items() if travels(name)}


def is_paper(name: str) -> bool:
    """Whether the file of this name is one that a licence asks to pass on."""
    return name.upper().startswith(PAPERS) and not name.endswith(".py")


def travels(name: str) -> bool:
    """Whether the file of this name in a model's folder is one that travels: neither weights nor code."""
    path = Path(name)
    if path.parent != Path():
        return str(path.parent) in FOLDERS and path.suffix == ".jinja"
    return is_paper(name) or (path.suffix in SUFFIXES and not name.endswith(OF_THE_FILES))


def copy_hf_assets(source: Path, target: Path) -> None:
    """Copy the files of `assets_of`.

    Raises:
        CheckpointError: a JSON file among them is none, of which transformers would only tell who loads the export; a
            file is too large; or a link leads out of the folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in assets_of(source):
        path = companion(source, name)
        assert path is not None  # `assets_of` has seen it
        if (size := path.stat().st_size) > LARGEST:
            raise CheckpointError(f"{path} has {size} bytes, more than such a file has ({LARGEST}); move it away.")
        if path.suffix == ".json":
            _read(path)
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """Write the config.json of a model whose checkpoint came without one, beside its tokenizer.

    Architecture and special tokens are added to `values`: transformers would take the first Llama's for those.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from compactlm_nemo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    kinds = ("bos", "eos", "pad")
    numbers = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]
    _write(folder / "config.json", {"architectures": [architecture]} | values | numbers)


def config_token_ids(folder: Path) -> set[int]:
    """Return the ids of tokens that config.json and generation_config.json name."""
    configs = [_read(folder / name) for name in _WITH_IDS if (folder / name).is_file()]
    values = [value for config in configs for key, value in config.items() if key.endswith("_token_id")]
    return {
        number for value in values for number in (value if isinstance(value, list) else [value]) if number is not None
    }


def trim_hf_assets(folder: Path, new_ids: Mapping[int, int], tokenizer: Mapping[str, Any]) -> None:
    """Make the small files of a model those of a trimmed vocabulary, in place.

    Args:
        new_ids: Id before -> id, of the tokens with a row; ids of no such token become null.
        tokenizer: The content of the trimmed tokenizer.json; other files with a vocabulary are removed.
    """
    _write(folder / "tokenizer.json", dict(tokenizer))
    for path in folder.iterdir():
        if path.suffix in (".model", ".tiktoken") or path.name in VOCABULARIES:
            path.unlink()
    for path in [folder / name for name in _WITH_IDS if (folder / name).is_file()]:
        values = _read(path)
        for key, value in values.items():
            if key.endswith("_token_id"):
                found = [new_ids[number] for number in value if number in new_ids] if isinstance(value, list) else None
                values[key] = new_ids.get(value) if found is None else found or None
        if "vocab_size" in values:
            values["vocab_size"] = len(new_ids)
        _write(path, values)
    path = folder / "tokenizer_config.json"
    if path.is_file() and "added_tokens_decoder" in (values := _read(path)):
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        tokens = [token for token in values["added_tokens_decoder"].values() if token["content"] in ids]
        values["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in tokens}
        _write(path, values)


def dtype_of(folder: Path) -> str | None:
    """Return the number format that a folder's config.json states, None where it states none."""
    values = _read(folder / "config.json")
    stated = values.get("dtype") or values.get("torch_dtype")
    return stated if isinstance(stated, str) else None


def write_for_every_reader(folder: Path) -> None:
    """Say in an exported folder what readers of transformers 4's files look for, beside what version 5 writes.

    Version 5 keeps theta and scaling of the rotary embedding in `rope_parameters` alone, the number format in `dtype`
    and Qwen's experts in `num_local_experts`; others would take theta = 10000, no scaling, float32 and 128 experts. Its
    class of tokenizers has another name there.
    """
    path = folder / "config.json"
    values = _read(path)
    rope = dict(values.get("rope_parameters") or {})
    if "full_attention" in rope:  # of families whose layers differ
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        values.pop("_sliding_window_pattern", None)  # `layer_types` says it, also of a student with other layers
        rope = dict(rope["full_attention"])
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.get("rope_type", "default")
        values["rope_scaling"] = None if kind == "default" else rope
        if values["model_type"] == "phi3" and not {"factor", "attention_factor"} & rope.keys() and kind != "default":
            # Version 4 takes these three alone, and version 5 them before `rope_parameters`.
            values["rope_scaling"] = {"type": kind} | {name: rope[name] for name in ("short_factor", "long_factor")}
    for written, read in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        if written in values:
            values.setdefault(read, values[written])  # Qwen's mixtures count them under either name, by version
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    _write(path, values)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = _read(path)
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):  # there a dict, and the list has this older name
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        notes = ("is_local", "backend", "local_files_only")  # of how it was loaded
        _write(path, {key: value for key, value in values.items() if key not in notes})


def older_reader_problem(dims: Dims) -> str | None:
    """Return why transformers 4, and what is built on it, cannot load a model of these sizes; None where it can."""
    if dims.family == "deepseek_v2" and abs((dims.attention_multiplier or 0) * dims.qk_head_dim**0.5 - 1) > 1e-6:
        return (
            "a deepseek_v2 with mscale_all_dim needs transformers 5, or the code that came with it; version 4 leaves "
            "it out of attention."
        )
    if dims.family == "qwen2_moe" and dims.num_heads * dims.head_dim != dims.hidden_size:
        return (
            f"a qwen2_moe with {dims.num_heads} heads of {dims.head_dim} in {dims.hidden_size} channels needs "
            "transformers 5; version 4, and vLLM, take the width of a head to be channels / heads."
        )
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again, or remove it.") from None


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
