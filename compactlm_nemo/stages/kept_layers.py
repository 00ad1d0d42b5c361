"""Layers that block-local distillation has finished, in files of unfinished work; a killed run goes on behind them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from compactlm_nemo.artifacts import sealed
from compactlm_nemo.parallel.collectives import broadcast_object
from compactlm_nemo.parallel.mesh import Mesh


class KeptLayers:
    """Finished layers in a folder: of each one file for every tensor- and expert-parallel rank.

    Ranks that have equal weights share a file, so the folder must be one that all ranks see.

    Args:
        folder: Of unfinished work in this layout.
        num_layers: Of the student.
        mesh: The student's.
    """

    def __init__(self, folder: Path, num_layers: int, mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh
        every = [(tp, ep) for tp in range(mesh.tp_size) for ep in range(mesh.ep_size)]
        whole = [i for i in range(num_layers) if all(self._path(i, *share).is_file() for share in every)]
        self.finished = set(broadcast_object(whole))

    def _path(self, layer: int, tp_rank: int, ep_rank: int) -> Path:
        return self.folder / f"layer_{layer}_tp_{tp_rank}_ep_{ep_rank}.safetensors"

    def load(self, layer: int) -> dict[str, Tensor] | None:
        """Return this rank's weights of a layer; None where the layer was not finished when the run began."""
        if layer not in self.finished:
            return None
        return load_file(self._path(layer, self.mesh.tp_rank, self.mesh.ep_rank))

    def save(self, layer: int, weights: dict[str, Tensor]) -> None:
        """Keep this rank's weights of a layer, once for all ranks that have the same."""
        if self.mesh.expert_dp_group.rank() == 0:
            with sealed(self._path(layer, self.mesh.tp_rank, self.mesh.ep_rank)) as temporary:
                save_file({name: weight.contiguous() for name, weight in weights.items()}, temporary)
