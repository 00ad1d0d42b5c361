"""First-order Taylor importance is measured of heads, query groups, neurons, channels and experts.

``I_u = sum over the weights w of unit u of |w * dL/dw|``, L the mean language-model loss over all calibration tokens
whose prediction counts: the gradient is that of all samples before the absolute value is taken. This is LLM-Pruner's
first-order, element-wise importance summed over a group of coupled weights (Ma et al. 2023, arXiv:2305.11627, section
3.2). Units:

- query head: its rows of qkv and of its bias, its sink, its columns of the output projection; where queries, keys and
  values are made from latents, its rows of what makes each of them, which are those of its group too;
- query group: its heads, and the key and value rows they share;
- neuron: its rows of fc1 (gate and up) and of its bias, its column of fc2;
- expert: all of its fc1 and fc2. Its row of the router is no part, nor its bias there: an expert without them would
  not be absent;
- hidden channel: column, row or entry of every weight that reads or writes the residual stream: embedding and output
  layer (a tied table once, with the sum of both gradients), norms, qkv, output projection and fc2 with their biases,
  fc1, router, and the gate of the shared expert.

The weight of a norm that is stored as its distance from 1 is taken as 1 plus what is stored, for a channel without it
has the weight 0. Norms inside a head (query and key) belong to no unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from compactlm_nemo.data.marks import counts_of, ids_of
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.importance import names
from compactlm_nemo.importance.depth import num_predictions
from compactlm_nemo.models.build import ModelChunks, global_names
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share, fill_schedule, positions_of
from compactlm_nemo.parallel.collectives import broadcast_object, gather_objects
from compactlm_nemo.parallel.mesh import Mesh

LossSum = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(final normed hidden states `[N, H]`, labels `[N]`, mask `[N]`) -> sum of the tokens' losses times the mask, with
gradient; called on the last stage."""


class Gradients:
    """This rank's share of the gradient of the summed loss over the samples so far, float32.

    Args:
        ddps: Megatron DDP around each chunk that leaves all gradients on every data-parallel rank.
        loss_sum: See `LossSum`.
        micro_batch: Samples of one forward and backward pass.
    """

    def __init__(self, ddps: ModelChunks, loss_sum: LossSum, micro_batch: int) -> None:
        self.ddps, self.mesh, self.loss_sum, self.micro_batch = ddps, ddps.mesh, loss_sum, micro_batch
        self.tokens = 0
        """Predictions so far that count, over all ranks."""
        self.sums = {name: torch.zeros_like(parameter.main_grad) for name, parameter in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        for idx, ddp in enumerate(self.ddps):
            for name, parameter in ddp.module.named_parameters():
                if parameter.requires_grad:
                    yield f"{idx}.{name}", parameter

    def add(self, windows_NS: Tensor, progress: Callable[[int], None]) -> None:
        """Add the gradient of further samples. Collective.

        Args:
            windows_NS: Equal on every rank; data-parallel ranks take every dp-th. S - 1 tokens of each are predicted,
                of which those without a mark count (`data.marks`).
            progress: Called with the number of samples, over all ranks, of each finished micro-batch; last stage only.
        """
        batches = _batches(windows_NS, self.mesh, self.micro_batch)
        _accumulate_gradients(self.ddps, batches, self.loss_sum, progress)
        tokens = num_predictions(windows_NS)
        for name, parameter in self._parameters():  # a main_grad is that of the mean over these tokens
            self.sums[name].add_(parameter.main_grad, alpha=tokens)
        self.tokens += tokens

    def state(self) -> dict[str, Tensor]:
        """Return the sums and the number of tokens, for a file of this rank."""
        return self.sums | {"tokens": torch.tensor(self.tokens)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the state that this rank gave in this layout."""
        for name, total in self.sums.items():
            total.copy_(state[name])
        self.tokens = int(state["tokens"])

    def finish(self) -> None:
        """Leave the gradient of L in every `main_grad`."""
        for name, parameter in self._parameters():
            parameter.main_grad.copy_(self.sums[name] / self.tokens)


def taylor_scores(gradients: Gradients) -> dict[str, Tensor]:
    """Score every unit, float32 under the names of `importance.names`, on the main rank; empty elsewhere. Collective.

    Args:
        gradients: The gradient over all calibration samples.
    """
    gradients.finish()
    mesh = gradients.mesh
    scores = _assembled(gather_objects((mesh.tp_rank, _unit_sums(gradients.ddps))))
    bad = broadcast_object(next((name for name, x in scores.items() if not bool(x.isfinite().all())), None))
    if bad is not None:
        raise NumericsError(
            f"score: taylor {bad} is NaN or infinite; check the teacher's weights, or score with model.precision=fp32."
        )
    return scores


class _Batch(NamedTuple):
    tokens_BS: Tensor
    counted_B: Tensor
    """1 for a sample of this rank, 0 for a repetition."""
    samples: int
    """Samples that count, over all data-parallel ranks."""


def _batches(windows_NS: Tensor, mesh: Mesh, micro_batch: int) -> list[_Batch]:
    """Put this data-parallel rank's samples into batches of one shape, as many as the schedule takes."""
    samples = DataParallelSamples(windows_NS, mesh, micro_batch)
    size = len(samples.batches[0])
    batches = []
    for idx, tokens_BS in enumerate(samples.batches):
        missing = size - len(tokens_BS)
        counted_B = F.pad(samples.counted(idx, mesh.dp_rank).float(), (0, missing))
        whole_BS = torch.cat([tokens_BS, tokens_BS[-1:].expand(missing, -1)])
        batches.append(_Batch(whole_BS, counted_B.to(tokens_BS.device, non_blocking=True), samples.num_counted(idx)))
    tokens_BS, counted_B, _ = batches[-1]
    return fill_schedule(batches, _Batch(tokens_BS, torch.zeros_like(counted_B), 0), mesh)


def _accumulate_gradients(
    ddps: ModelChunks, batches: list[_Batch], loss_sum: LossSum, progress: Callable[[int], None]
) -> None:
    """Leave the gradient of these batches' mean loss in every `main_grad`, by one schedule of Megatron. Collective."""
    mesh = ddps.mesh
    for ddp in ddps:
        ddp.zero_grad_buffer()
    size, length = batches[0].tokens_BS.shape

    def step(iterator: Iterator[_Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        inputs_BS = context_share(batch.tokens_BS, mesh)
        return model(inputs_BS, positions_of(inputs_BS), None), partial(loss, batch)

    def loss(batch: _Batch, hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels_BS = ids_of(batch.tokens_BS).roll(-1, dims=1)
        mask_BS = batch.counted_B[:, None] * counts_of(batch.tokens_BS)
        mask_BS[:, -1] = 0  # what follows the window is not known
        labels_N, mask_N = (context_share(x_BS, mesh).T.flatten() for x_BS in (labels_BS, mask_BS))
        total = loss_sum(hidden_SBH.flatten(0, 1), labels_N, mask_N)
        progress(batch.samples)
        return total, mask_N.sum().to(torch.int), total.detach()

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in ddps],
        model=ddps,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=size,
        forward_only=False,
    )


def _unit_sums(ddps: ModelChunks) -> dict[str, Tensor]:
    """Sum what this rank's parameters add to each of their units, without parameters that another rank reports."""
    units = _Units(ddps.dims, ddps.mesh)
    for name, parameter in global_names(ddp.module for ddp in ddps):
        if parameter.requires_grad and units.are_from_here(name):
            units.add(name, parameter)
    return {name: x.cpu() for name, x in units.sums.items()}


class _Units:
    """Sums of |w * g| by unit, float64, over the shards of one rank.

    Shape suffixes: H channels, F neurons, O and I rows and columns of a shard, G query groups, P rows of D in a group.
    """

    def __init__(self, dims: Dims, mesh: Mesh) -> None:
        self.dims, self.mesh = dims, mesh
        self.heads_of_group = dims.num_heads // dims.num_query_groups
        self.sums: dict[str, Tensor] = {}

    def are_from_here(self, name: str) -> bool:
        """Whether this rank reports a parameter: of ranks with equal copies the first one does."""
        if name == "output_layer.weight" and self.dims.tied_embeddings:
            return False  # a copy of the embedding, with an equal gradient
        # Expert-parallel ranks are neighbours among the data- and context-parallel ones.
        copy = self.mesh.dp_cp_group.rank()
        return copy < self.mesh.ep_size if ".local_experts." in name else copy == 0

    def add(self, name: str, parameter: Tensor) -> None:
        layer, module, kind = _parsed(name)
        weight = parameter.detach().float()
        if module.endswith("layernorm") and kind == "weight" and self.dims.norm_1p:
            weight = weight + 1
        product = (weight * parameter.main_grad).abs_()  # type: ignore[attr-defined]
        if module in ("embedding.word_embeddings", "output_layer"):
            self._hidden(_over(product, 0))
        elif module.endswith(".linear_qkv"):
            self._qkv(layer, product)
        elif module.endswith((".linear_q_proj", ".linear_q_up_proj", ".linear_kv_up_proj")):
            if module.endswith(".linear_q_proj"):
                self._hidden(_over(product, 0))
            rows = self.dims.qk_head_dim
            if "kv" in module:
                rows = self.dims.qk_nope_head_dim + self.dims.head_dim
            self._heads(layer, _over(product, 1).view(-1, 1, rows))
        elif module.endswith(".linear_proj") and kind == "weight":
            self._hidden(_over(product, 1))
            self._heads(layer, _over(product, 0).view(-1, self.heads_of_group, self.dims.head_dim))
        elif module.endswith(".core_attention"):  # its sinks
            self._heads(layer, product.double().view(-1, self.heads_of_group, 1))
        elif module.endswith(".router") and kind == "bias":
            pass
        elif module.endswith(".linear_fc1"):
            self._fc1(layer, module, product)
        elif module.endswith(".linear_fc2") and kind == "weight":
            self._hidden(_over(product, 1))
            self._neurons(layer, module, _over(product, 0))
        elif module.endswith(("q_layernorm", "k_layernorm", "kv_layernorm", "query_norm", "key_norm")):
            pass
        elif self.mesh.tp_rank == 0:  # equal on every tensor-parallel rank: norms, biases of writers, gates
            self._hidden(product.double() if product.ndim == 1 else _over(product, 0))
            if ".local_experts." in module:
                self._expert(layer, module, product.double())

    def _qkv(self, layer: int, product: Tensor) -> None:
        if product.ndim == 2:
            self._hidden(_over(product, 0))
            product = _over(product, 1)
        self._heads(layer, product.double().view(-1, self.heads_of_group + 2, self.dims.head_dim))

    def _heads(self, layer: int, values_GPD: Tensor) -> None:
        """Add to heads and groups: behind a group's query heads may come its key and value, which belong to no head."""
        values_GP = values_GPD.sum(dim=-1)
        self._to(names.heads_key(layer), values_GP[:, : self.heads_of_group].flatten())
        self._to(names.groups_key(layer), values_GP.sum(dim=-1))

    def _fc1(self, layer: int, module: str, product: Tensor) -> None:
        if product.ndim == 2:
            self._hidden(_over(product, 0))
            product = _over(product, 1)
        halves = 2 if self.dims.gated_mlp else 1
        self._neurons(layer, module, product.double().view(halves, -1).sum(dim=0))

    def _neurons(self, layer: int, module: str, values_F: Tensor) -> None:
        if expert := re.search(r"\.local_experts\.(\d+)\.", module):
            self._to(names.expert_mlp_key(layer, int(expert[1])), values_F)
            self._expert(layer, module, values_F)
        elif ".shared_experts." in module:
            self._to(names.shared_expert_key(layer), values_F)
        else:
            self._to(names.mlp_key(layer), values_F)

    def _expert(self, layer: int, module: str, values: Tensor) -> None:
        expert = re.search(r"\.local_experts\.(\d+)\.", module)
        assert expert is not None
        experts = values.new_zeros(self.dims.num_experts)
        experts[int(expert[1])] = values.sum()
        self._to(names.experts_key(layer), experts)

    def _hidden(self, values_H: Tensor) -> None:
        self._to(names.HIDDEN, values_H)

    def _to(self, unit: str, values: Tensor) -> None:
        self.sums[unit] = self.sums[unit] + values if unit in self.sums else values


def _over(product_OI: Tensor, dim: int) -> Tensor:
    return product_OI.sum(dim=dim, dtype=torch.float64)


def _parsed(name: str) -> tuple[int, str, str]:
    """Return `(layer, module, kind)` of a parameter; -1 outside the layers."""
    module, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", module):
        return int(match[1]), match[2], kind
    return -1, module, kind


def _assembled(gathered: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Make whole vectors: channels and experts are summed over the ranks, the parts of all other units are joined."""
    parts: dict[str, list[Tensor]] = {}
    for _, sums in sorted(gathered, key=lambda item: item[0]):
        for name, x in sums.items():
            parts.setdefault(name, []).append(x)
    return {
        name: (
            torch.stack(xs).sum(dim=0) if name == names.HIDDEN or name.endswith(".experts") else torch.cat(xs)
        ).float()
        for name, xs in parts.items()
    }
