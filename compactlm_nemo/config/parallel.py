"""Settings of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.fingerprint import setting
from compactlm_nemo.errors import require


@dataclass(kw_only=True)
class ParallelConfig:
    tp: int = setting(1, changes_result=False)
    """Tensor-parallel ranks; must divide heads, query groups and MLP width of teacher and student."""
    sequence_parallel: bool = setting(False, changes_result=False)
    """Split norms and residual stream along the sequence over the tensor-parallel ranks."""
    pp: int = setting(1, changes_result=False)
    """Pipeline stages."""
    virtual_stages: int = setting(1, changes_result=False)
    """Model chunks of each pipeline rank; more than 1 interleaves them and needs `parallel.pp` > 1."""
    pp_split: list[int] = setting([], changes_result=False)
    """Layers of each chunk in pipeline order, as proportions ([1, 3] cuts 8 layers into 2 and 6); empty is equal."""
    cp: int = setting(1, changes_result=False)
    """Context-parallel ranks: each holds a part of every sequence."""
    ep: int = setting(1, changes_result=False)
    """Expert-parallel ranks; they are data-parallel ranks outside the expert layers."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "virtual_stages", "cp", "ep"):
            require(getattr(self, name) > 0, f"parallel.{name}={getattr(self, name)} must be > 0; 1 turns it off.")
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=true needs parallel.tp > 1; raise tp or set it to false.",
        )
        require(
            self.virtual_stages == 1 or self.pp > 1,
            f"parallel.virtual_stages={self.virtual_stages} needs parallel.pp > 1; raise pp or set it to 1.",
        )
        require(
            len(self.pp_split) in (0, self.num_chunks) and all(part > 0 for part in self.pp_split),
            f"parallel.pp_split={self.pp_split} must be {self.num_chunks} numbers > 0, one for each of pp x "
            "virtual_stages chunks; leave it empty for equal parts.",
        )

    @property
    def num_chunks(self) -> int:
        """Pieces the layers are cut into."""
        return self.pp * self.virtual_stages

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model and work on one batch."""
        return self.tp * self.pp * self.cp
