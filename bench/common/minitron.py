"""NVIDIA Model-Optimizer's `mcore_minitron`: its importance scoring, timed, and its pruning. Runs in its environment.

Two models are scored, each against its own forward pass without hooks:

- `shipped`: Megatron-Core's GPTModel with its local layers, the only ones Model-Optimizer accepts without Transformer
  Engine: unfused attention, and logits that scoring throws away. This is what a user of it runs on this machine.
- `same_forward`: this package's model, converted by Model-Optimizer in place. Its forward pass is the one that our own
  scoring is compared with, so what is left is the difference between the hooks of the two tools.

A timed pass is what `MCoreMinitronSearcher.run_search` does between the conversion of the model and the sorting of its
weights: register the estimators, run the forward loop, collect activations and layer scores, remove the hooks. Sorting
and cutting are not part of it. The bare model is a second copy that was never converted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.common.teacher import CACHE, PRECISIONS, VOCAB_MULTIPLE, add_run_arguments, calibration_batches, our_model
from bench.common.worker import Pass, answers_only, serve
from compactlm_nemo.config.parallel import ParallelConfig
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.launch import launched
from compactlm_nemo.parallel.mesh import Mesh

if TYPE_CHECKING:
    from compactlm_nemo.models.build import ModelChunks


def shipped_model(mesh: Mesh, dtype: torch.dtype) -> ModelChunks:
    """One GPTModel of Megatron-Core's local layers with the teacher's weights, in evaluation mode."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from safetensors.torch import load_file

    from compactlm_nemo.models.build import ModelChunks, fill
    from compactlm_nemo.models.megatron_config import transformer_config

    dims = Dims.load(CACHE / "dims.json")
    model = GPTModel(
        config=transformer_config(dims, mesh, dtype),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=dims.padded_vocab(1, VOCAB_MULTIPLE),
        max_sequence_length=dims.max_position_embeddings,
        share_embeddings_and_output_weights=dims.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(dims.rope_theta),
    )
    chunks = ModelChunks(
        [model.to(dtype)], dims, mesh, chunk_tokens=1
    )  # torch's norms are float32 whatever the config says
    fill(chunks, load_file(CACHE / "teacher.safetensors").__getitem__, VOCAB_MULTIPLE)
    return chunks.eval()


@cache
def register_norms() -> None:
    """Let Model-Optimizer convert RMSNorms without Transformer Engine: it knows only that library's and Apex's."""
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    from compactlm_nemo.models.spec import Norm

    @DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})
    class _DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    @DMRegistry.register({Norm: "compactlm_nemo.models.spec.Norm"})
    class _DynamicNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)


def convert(chunks: ModelChunks) -> ModelChunks:
    """The model, which is one chunk, as Model-Optimizer's search space, in place, with the default divisors.

    It insists on converting Megatron's own core attention, which has no weights; any other is put aside meanwhile.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from modelopt.torch.prune.plugins.mcore_minitron import convert_mcore_minitron, get_mcore_minitron_config

    (model,) = chunks
    aside: list[tuple[Any, Any]] = []
    for layer in chunks.layers():
        attention = layer.self_attention
        if not isinstance(attention.core_attention, DotProductAttention):
            aside.append((attention, attention.core_attention))
            attention.core_attention = DotProductAttention(
                model.config, layer.layer_number, AttnMaskType.causal, attention_type="self"
            )
    convert_mcore_minitron(model, get_mcore_minitron_config())
    for attention, core in aside:
        attention.core_attention = core
    return chunks


def score(model: Any, forward_loop: Callable[[Any], None]) -> dict[str, Tensor]:
    """Importance of every unit of a converted model, under the names of this package's scores files."""
    from modelopt.torch.prune.plugins.mcore_minitron import ImportanceEstimatorRegistry

    registry = ImportanceEstimatorRegistry(model)
    forward_loop(model)
    activations, layer_scores = registry.get_activations_and_layer_scores()
    registry.cleanup()
    forget(model)
    return plain_scores(activations[0], layer_scores, model.config.kv_channels)


def forget(model: Any) -> None:
    """Drop what a pass accumulated: the registry expects a model that was never scored, and leaves its sums there."""
    for module in model.modules():
        for name in ("_activations", "_scores"):
            if hasattr(module, name):
                delattr(module, name)


def plain_scores(activations: dict[str, Any], layer_scores: dict[int, Any], head_dim: int) -> dict[str, Tensor]:
    """Its state -> importance as its estimators define it: root of the sum over samples of (mean over tokens)^2.

    Neurons: as it is. Heads: the L2 norm over the head dimension of those numbers. Hidden: the sum over the norms of
    all layers, without the final norm. Layers: the sum over batches of 1 - mean cosine.
    """
    scores: dict[str, Tensor] = {}
    for name, squares in activations.items():
        if name == "":
            scores["hidden"] = torch.stack([x.sqrt() for x in squares.values()]).sum(dim=0)
        elif name.endswith("self_attention"):
            scores[f"layers.{name.split('.')[2]}.heads"] = squares.sqrt().view(-1, head_dim).norm(dim=1)
        else:
            scores[f"layers.{name.split('.')[2]}.mlp"] = squares.sqrt()
    scores["depth"] = torch.tensor([float(layer_scores[number]) for number in sorted(layer_scores)])
    return scores


def prune(model: Any, export_config: dict[str, int], forward_loop: Callable[[Any], None], scores: Path) -> Any:
    """Cut a model that was not converted to `export_config` with Model-Optimizer's public entry point, in place.

    `scores` is its own checkpoint: written by the first call, read by later ones, which then need no forward pass.
    Keys: hidden_size, ffn_hidden_size, num_attention_heads, num_layers. Query groups stay as they are.
    """
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    register_norms()
    finest = get_mcore_minitron_config(hidden_size_divisor=1, ffn_hidden_size_divisor=1, num_layers_divisor=1)
    with scalars_gathered_as_vectors():
        model, _ = mtp.prune(
            model,
            mode=[("mcore_minitron", finest)],
            constraints={"export_config": dict(export_config)},
            dummy_input=None,
            config={"forward_loop": forward_loop, "scores_path": str(scores)},
        )
    return model


@contextmanager
def scalars_gathered_as_vectors() -> Iterator[None]:
    """Model-Optimizer gathers a scalar when it drops layers; nccl takes it for a vector of one number, gloo refuses."""
    gather = torch.distributed.all_gather_into_tensor
    torch.distributed.all_gather_into_tensor = lambda output, x, **options: gather(output, x.reshape(-1), **options)
    try:
        yield
    finally:
        torch.distributed.all_gather_into_tensor = gather


@torch.no_grad()
def lm_loss(chunks: ModelChunks, mesh: Mesh, batches: list[Tensor], vocab_size: int) -> float:
    """Mean next-token loss in nats of a model that returns logits, over `[B, S]` batches, each sequence on its own."""
    total, count = 0.0, 0
    for tokens in batches:
        (logits,) = forward_each(chunks, [tokens], lambda _, logits: logits)
        targets = tokens[:, 1:].flatten()
        logits_NV = logits[:, :-1, :vocab_size].flatten(0, 1).float()
        total += float(torch.nn.functional.cross_entropy(logits_NV, targets, reduction="sum"))
        count += len(targets)
    return total / count


class Subject:
    """One kind of model, as it is and converted, and the passes over it."""

    def __init__(self, build: Callable[[], ModelChunks], mesh: Mesh, batches: list[Tensor]) -> None:
        self.mesh, self.batches = mesh, batches
        self.plain, self.converted = build(), convert(build())

    def bare(self) -> None:
        """The forward pass of the model as it is."""
        self._forward(self.plain, self.batches)

    def scored(self) -> dict[str, Tensor]:
        """The same with Model-Optimizer's hooks on the converted model, up to its scores."""
        return score(self.converted[0], lambda _: self._forward(self.converted, self.batches))

    def warm_up(self) -> None:
        """One batch through both."""
        self._forward(self.plain, self.batches[:1])
        self._forward(self.converted, self.batches[:1])

    def _forward(self, chunks: ModelChunks, batches: list[Tensor]) -> None:
        forward_each(chunks, batches, lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times Model-Optimizer's scoring; bench.importance starts it.")
    add_run_arguments(parser)
    parser.add_argument("--model", choices=["shipped", "same_forward"], required=True)
    args = parser.parse_args()
    answers = answers_only()
    dtype, batches = PRECISIONS[args.precision], calibration_batches(args)
    with launched(ParallelConfig(), seed=1) as mesh:
        register_norms()
        build = (lambda: shipped_model(mesh, dtype)) if args.model == "shipped" else (lambda: our_model(mesh, dtype)[1])
        subject = Subject(build, mesh, batches)
        passes: dict[str, Pass] = {"bare": subject.bare, "scored": subject.scored, "warm_up": subject.warm_up}
        about = {"tool": f"nvidia-modelopt {version('nvidia-modelopt')}", "threads": torch.get_num_threads()}
        serve(answers, passes, about)


if __name__ == "__main__":
    main()
