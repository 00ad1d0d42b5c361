"""The weights of one layer under training: float32 copies, their gradients over all ranks, and Adam.

Megatron's own optimizer and its finishing of gradients are of whole models: they would wait for stages that have no
part in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.parallel.collectives import all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh

BETAS = (0.9, 0.95)
LEAST_SIZE = 1e-3
"""Of a weight, where steps are a share of its size: biases may all be 0."""


class LayerWeights:
    """The weights of a layer, of which this rank has its share, and their optimizer.

    Args:
        layer: Its parameters are made to ask for gradients until the object is gone, but those that are no weights
            (the balance of a router's choice), and are moved in place.
        mesh: Whose ranks have the layer.
        lr: Largest learning rate, as a share of the root mean square of each weight.
    """

    def __init__(self, layer: Any, mesh: Mesh, *, lr: float) -> None:
        self.layer, self.mesh, self.lr = layer, mesh, lr
        named = [(name, x) for name, x in layer.named_parameters() if not name.endswith("expert_bias")]
        self.names, self.weights = [name for name, _ in named], [x for _, x in named]
        self.main = [x if x.dtype is torch.float32 else x.detach().float() for x in self.weights]
        groups = [{"params": [main], "size": size} for main, size in zip(self.main, self._sizes(), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
        for weight in self.weights:
            weight.requires_grad_(True)
        self.gradients: list[Tensor | None] = [None] * len(self.weights)

    def _sizes(self) -> list[float]:
        """Return the root mean square of each whole weight, at least `LEAST_SIZE`; of a norm of 1 + w that of 1 + w."""
        mesh, sizes = self.mesh, []
        for name, main in zip(self.names, self.main, strict=True):
            is_one_plus = name.endswith("layernorm.weight") and self.layer.config.layernorm_zero_centered_gamma
            mean = (main.detach() + float(is_one_plus)).double().square().mean()
            sizes.append(max(math.sqrt(float(all_reduce_sum(mean, mesh.tp_group)) / mesh.tp_size), LEAST_SIZE))
        return sizes

    def take_gradients(self) -> None:
        """Add the gradients of a micro-batch, float32, to those of the step."""
        for i, weight in enumerate(self.weights):
            if weight.grad is not None:
                before, gradient = self.gradients[i], weight.grad.float()
                self.gradients[i] = gradient if before is None else before.add_(gradient)
                weight.grad = None

    def update(self, share: float) -> None:
        """Move the weights against all ranks' gradients with this share of the learning rate. Collective."""
        for main, gradient in zip(self.main, self.gradients, strict=True):
            main.grad = torch.zeros_like(main) if gradient is None else gradient  # an expert without tokens has none
        self._sum_over_ranks()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share * group["size"]
        self.optimizer.step()
        for weight, main in zip(self.weights, self.main, strict=True):
            if main is not weight:
                weight.copy_(main)
            main.grad = None
        self.gradients = [None] * len(self.weights)

    def finish(self) -> None:
        """Leave the layer as one that is not trained."""
        for weight in self.weights:
            weight.requires_grad_(False)

    def _sum_over_ranks(self) -> None:
        """Sum gradients over the ranks that saw other tokens, and those of replicated weights that saw other channels.

        Weights that all tensor-parallel ranks have see parts of the sequence under sequence parallelism, and the norms
        of single heads see this rank's heads; experts are those of `expert_dp_group` alone.
        """
        mesh, config = self.mesh, self.layer.config

        def is_partial(name: str, weight: Any) -> bool:
            is_of_sequence = mesh.is_sequence_parallel and getattr(weight, "sequence_parallel", False)
            return is_of_sequence or config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)

        self._sum(mesh.tp_group, is_partial)
        self._sum(mesh.dp_cp_group, lambda _, weight: getattr(weight, "allreduce", True))
        self._sum(mesh.expert_dp_group, lambda _, weight: not getattr(weight, "allreduce", True))

    def _sum(self, group: ProcessGroup, is_meant: Callable[[str, Any], bool]) -> None:
        """Sum the gradients of some weights over a group in one message."""
        if group.size() == 1:
            return
        named = zip(self.names, self.weights, self.main, strict=True)
        gradients: list[Any] = [main.grad for name, weight, main in named if is_meant(name, weight)]
        if gradients:
            _scatter(all_reduce_sum(torch.cat([x.flatten() for x in gradients]), group), gradients)


def _scatter(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copy consecutive parts of a vector into tensors."""
    first = 0
    for tensor in tensors:
        tensor.copy_(flat[first : first + tensor.numel()].view_as(tensor))
        first += tensor.numel()
