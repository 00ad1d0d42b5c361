"""Which hidden states of teacher and student are compared: places in both models, from the settings."""

from __future__ import annotations

from typing import NamedTuple

from compactlm_nemo.config.loss import HiddenConfig, Projection
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims


class StatePlace(NamedTuple):
    """The place of a state in a model: behind layer `layer` and the norm that follows, or inside that layer."""

    kind: str
    """`layers`, `attention`, `mlp_input` or `embedding`."""
    layer: int


class LayerPair(NamedTuple):
    """Two places, of teacher and student, whose states are compared."""

    teacher: StatePlace
    student: StatePlace

    @property
    def name(self) -> str:
        """W&B name of the loss between the two states."""
        kind, layer = self.teacher
        return f"train/hidden_{kind}" + ("" if kind == "embedding" else f"_{layer}_{self.student.layer}")


def layer_pairs(cfg: HiddenConfig, teacher: Dims, student: Dims) -> list[LayerPair]:
    """Return the pairs that the settings name, with negative layers counted from the end.

    Raises:
        ConfigError: a layer that a model does not have, or widths that need a projection.
    """
    pairs = [LayerPair(StatePlace("embedding", 0), StatePlace("embedding", 0))] if cfg.embedding else []
    for kind, maps in cfg.maps().items():
        for teacher_layer, student_layer in maps:
            layers = []
            for model, dims, layer in (("teacher", teacher, teacher_layer), ("student", student, student_layer)):
                if not -dims.num_layers <= layer < dims.num_layers:
                    raise ConfigError(
                        f"distill.hidden.{kind}: layer {layer} must be one of the {model}'s {dims.num_layers} "
                        f"(0 to {dims.num_layers - 1}, or -1 to -{dims.num_layers} from the end)."
                    )
                layers.append(layer % dims.num_layers)
            pairs.append(LayerPair(StatePlace(kind, layers[0]), StatePlace(kind, layers[1])))
    if repeated := {pair.name for pair in pairs if pairs.count(pair) > 1}:
        raise ConfigError(f"distill.hidden names {min(repeated).removeprefix('train/hidden_')} twice; leave one out.")
    if pairs and cfg.projection is Projection.none and teacher.hidden_size != student.hidden_size:
        raise ConfigError(
            f"distill.hidden.projection=none needs equal widths, not {teacher.hidden_size} and {student.hidden_size}; "
            "use shared."
        )
    return pairs
