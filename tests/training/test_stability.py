"""A step that is not finite is skipped, a loss that jumps sends the run back, the best weights are found again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig, Result
from compactlm_nemo.config.loss import CROSS_ENTROPY, HiddenConfig
from compactlm_nemo.distill.hidden_states import HiddenStateLoss
from compactlm_nemo.distill.layer_pairs import layer_pairs
from compactlm_nemo.distill.loop import distill
from compactlm_nemo.distill.projections import Projections
from compactlm_nemo.distill.teacher import LiveTeacher
from compactlm_nemo.distill.teacher_correction import TeacherCorrection
from compactlm_nemo.errors import ConfigError, NumericsError
from compactlm_nemo.losses.targets import Targets
from compactlm_nemo.models.build import ModelChunks, global_names
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.training.batches import Batch
from compactlm_nemo.training.best_weights import EVAL_LOSS, BestWeights
from compactlm_nemo.training.callbacks import Callback, MetricsLog, Step
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.stability import FEWEST, LossSpikes, NonFiniteSteps
from compactlm_nemo.training.tracker import LOSS
from tests.support.meshes import filled, mesh_of
from tests.support.ranks import run_ranks
from tests.support.tiny_models import VOCAB, save_tiny

CASE = "llama"


CONFIG = DistillConfig(steps=6, global_batch=2, micro_batch=2, lr=1e-2, min_lr=1e-3, checkpoint_every=3)


def sample(idx: int) -> Tensor:
    return torch.randint(0, VOCAB, (13,), generator=torch.Generator().manual_seed(idx))


class Training:
    """One run of the real loop on a tiny model."""

    def __init__(
        self, root: Path, mesh: Mesh, cfg: DistillConfig, evaluate: Callable[[], dict[str, float]] | None = None
    ) -> None:
        self.root, self.mesh, self.cfg, self.evaluate = root, mesh, cfg, evaluate or dict
        _, self.student = filled(root / "student", self.mesh)
        self.dims, self.teacher = filled(root / "teacher", self.mesh)
        self.metrics: dict[int, dict[str, float]] = {}
        self.rewound: list[int] = []
        self.on_input: Callable[[int | None], None] | None = None
        self.spikes, self.non_finite = LossSpikes(cfg.spike_factor, cfg.spike_limit), NonFiniteSteps(cfg.skip_limit)
        self.others: list[Callback] = []

    def add_hidden_loss_and_correction(self, name: str) -> None:
        hidden = HiddenConfig(layers=[[1, 1]])
        dims, teacher_dims = (open_hf(self.root / name)[0] for name in ("student", "teacher"))
        start_GH = torch.eye(teacher_dims.hidden_size)[:, : dims.hidden_size]
        projections = Projections(1, True, start_GH, self.cfg)
        pairs = layer_pairs(hidden, teacher_dims, dims)
        self.hidden_loss = HiddenStateLoss(hidden, pairs, self.teacher, self.student, projections)
        teacher_correction = TeacherCorrection(
            self.teacher,
            replace(self.cfg, loss=CROSS_ENTROPY),
            checkpoints=Checkpoints(self.root / f"{name}_teacher", self.cfg.keep_checkpoints + 1, True),
        )
        self.on_input = self.hidden_loss.before_teacher_micro_batch
        self.others = [self.hidden_loss, teacher_correction]

    def trained(self) -> dict[str, Tensor]:
        """All that training has moved."""
        loss = self.hidden_loss
        assert loss.projections is not None
        teacher = {f"teacher {name}": value.detach() for name, value in global_names(self.teacher)}
        extra = {"projection": loss.projections.weights[0].detach(), "alpha": torch.tensor(loss.alpha or 0.0)}
        return self.weights() | teacher | extra

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in global_names(self.student)}

    def run(
        self, name: str, draw: Callable[[int], Tensor] = sample, disturb: Callable[[int, Tensor], Tensor] | None = None
    ) -> TrainState:
        """Train on what `draw` gives; `disturb` changes the teacher's head for a global batch, by its number."""
        cfg, checkpoints = self.cfg, Checkpoints(self.root / name, self.cfg.keep_checkpoints, True)
        self.best_weights = BestWeights(
            self.evaluate, every=cfg.eval_every, num_steps=cfg.steps, result=cfg.result, checkpoints=checkpoints
        )
        log = MetricsLog(self.log, every=cfg.log_every, rewind=self.rewound.append)
        return distill(
            self.student,
            _DisturbedTeacher(self.teacher, self.on_input, disturb or (lambda batch, head: head)),
            draw,
            cfg,
            [self.spikes, self.non_finite, *self.others, self.best_weights, log],
            checkpoints=checkpoints,
        )

    def states(self) -> list[dict[str, Any]]:
        """What the callbacks hold at the end."""
        return [callback.state() for callback in (self.spikes, self.non_finite, self.best_weights)]

    def log(self, step: int, values: dict[str, float]) -> None:
        self.metrics[step] = values


class _DisturbedTeacher(LiveTeacher):
    """Changes its head before the pass over a batch, whenever that batch was read."""

    def __init__(self, chunks: ModelChunks, on_input: Any, disturb: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(chunks, on_input)
        self.disturb, self.head = disturb, chunks.head_weight.detach().clone()

    def targets(self, batches: list[Batch]) -> Sequence[Targets]:
        with torch.no_grad():
            self.chunks.head_weight.copy_(self.disturb(batches[0].samples[0] // CONFIG.global_batch, self.head))
        return super().targets(batches)


def at(batch: int, change: Callable[[Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Change the head for this global batch alone."""
    return lambda number, head: change(head) if number == batch else head


def _nan_is_skipped(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    reached: list[dict[str, Tensor]] = []

    def note() -> dict[str, float]:
        reached.append(training.weights())
        return {EVAL_LOSS: 1.0}

    training = Training(root, mesh, replace(CONFIG, eval_every=1), note)
    end = training.run("nan", disturb=at(3, lambda head: head * math.nan))
    assert end.step == CONFIG.steps
    assert [training.metrics[step]["train/skipped_steps"] for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert math.isnan(training.metrics[3]["train/loss"]) and math.isfinite(training.metrics[4]["train/loss"])
    moved = [any(not a[key].equal(b[key]) for key in a) for a, b in zip(reached, reached[1:], strict=False)]
    assert moved == [True, True, False, True, True]
    assert all(value.isfinite().all() for value in reached[-1].values())

    assert training.non_finite.skipped == 1
    again = Training(root, mesh, CONFIG)
    assert again.run("nan") == end
    assert again.states() == training.states()  # it is counted on after a restart

    stubborn = Training(root, mesh, replace(CONFIG, skip_limit=1))
    with pytest.raises(NumericsError, match=r"step 1: train/loss is nan for the 2th step in a row; lower distill.lr"):
        stubborn.run("stubborn", disturb=lambda batch, head: head * math.nan)


def _spike_goes_back(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    cfg = replace(CONFIG, steps=FEWEST + 5, spike_factor=3.0)
    training = Training(root, mesh, cfg)
    end = training.run("spike", disturb=at(FEWEST + 2, lambda head: head * 20))  # batch 10, of step 10
    assert (end.step, end.skipped_batches, training.spikes.rewinds) == (13, 2, 1)
    assert training.rewound == [9]
    assert training.metrics[12]["train/rewinds"] == 1
    assert [training.metrics[step]["train/batch"] for step in (8, 9, 12)] == [8, 11, 14]

    def passed_over(idx: int) -> Tensor:
        batch, place = divmod(idx, CONFIG.global_batch)
        return sample((batch + 2 * (batch >= 9)) * CONFIG.global_batch + place)

    straight = Training(root, mesh, cfg)
    straight.run("straight", passed_over)
    assert all(value.equal(training.weights()[key]) for key, value in straight.weights().items())

    again = Training(root, mesh, cfg)  # what was passed over is remembered
    assert again.run("spike") == end
    assert again.states() == training.states()

    hopeless = Training(root, mesh, replace(cfg, spike_limit=0))
    with pytest.raises(NumericsError, match=r"step 10: train/loss=.* exceeds 3 x the median .* for the 1th time"):
        hopeless.run("hopeless", disturb=at(10, lambda head: head * 20))


class _SpikeAtStep5(LossSpikes):
    def must_rewind(self, step: Step) -> bool:
        if step.number != 5 or self.rewinds:
            return False
        self.rewinds += 1
        return True


def _spike_takes_back_all_that_trains(rank: int, world: int, root: Path) -> None:
    mesh, cfg = mesh_of(), replace(CONFIG, steps=8, spike_factor=3.0)

    def passed_over(idx: int) -> Tensor:
        return sample(idx + 3 * CONFIG.global_batch * (idx >= 3 * CONFIG.global_batch))

    found = []
    for name, spikes, draw in (("rewound", _SpikeAtStep5, sample), ("straight", LossSpikes, passed_over)):
        training = Training(root, mesh, cfg)
        training.spikes = spikes(cfg.spike_factor, cfg.spike_limit)
        training.add_hidden_loss_and_correction(name)
        before = {key: value.clone() for key, value in training.trained().items()}
        training.run(f"{name}_student", draw)
        found.append(training.trained())
        assert training.rewound == ([3] if name == "rewound" else [])
        assert not any(value.equal(found[-1][key]) for key, value in before.items())
    rewound, straight = found
    assert all(value.equal(rewound[key]) for key, value in straight.items())


def _weights_that_are_not_finite_are_not_saved(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()

    class Ruin(Callback):
        """Leaves a NaN of the last rank in the weights, or in a moment, at step 4."""

        def __init__(self, kind: str) -> None:
            self.kind = kind

        def after_update(self, step: Step) -> None:
            if step.number != 4:
                return
            with torch.no_grad():
                if self.kind == "weight":
                    next(step.model.ddps[0].parameters()).view(-1)[-1] = math.nan
                else:
                    adam = step.model.optimizer.chained_optimizers[0].optimizer
                    next(iter(adam.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf

    for kind in ("weight", "moment"):
        training = Training(root, mesh, replace(CONFIG, keep_checkpoints=1))
        training.others = [Ruin(kind)]
        with pytest.raises(NumericsError, match=r"after step 6 .* NaN or infinity.* the checkpoint of step 3 stays"):
            training.run(f"ruined_{kind}")
        assert [path.name for path in (root / f"ruined_{kind}").glob("step_*")] == ["step_0000003"]
        assert json.loads((root / f"ruined_{kind}" / "latest.json").read_text()) == {"step": 3}


def _a_loss_that_is_not_finite_is_never_the_best(rank: int, world: int, root: Path) -> None:
    losses = iter([math.nan, 3.0, math.nan, 2.0, -math.inf, 2.5])
    cfg = replace(CONFIG, eval_every=1, result=Result.best)
    training = Training(root, mesh_of(), cfg, lambda: {EVAL_LOSS: next(losses)})
    training.run("best_of_nan")
    assert (training.best_weights.best_step, training.best_weights.best_loss) == (4, 2.0)


def _bad_steps_in_a_row_are_counted_over_a_restart(rank: int, world: int, root: Path) -> None:
    mesh, cfg = mesh_of(), replace(CONFIG, skip_limit=2, checkpoint_every=1)

    def ruin(batch: int, head: Tensor) -> Tensor:
        return head * math.nan if batch >= 2 else head

    for _ in range(2):
        with pytest.raises(NumericsError, match=r"step 4: train/loss is nan for the 3th step in a row"):
            Training(root, mesh, cfg).run("crawl", disturb=ruin)
    assert json.loads((root / "crawl" / "latest.json").read_text()) == {"step": 4}


def _best_is_the_result(rank: int, world: int, root: Path) -> None:
    mesh = mesh_of()
    losses = iter([3.0, 2.0, 2.5, 4.0, 3.0, 2.2])
    reached: list[dict[str, Tensor]] = []

    def measure() -> dict[str, float]:
        reached.append(training.weights())
        return {EVAL_LOSS: next(losses)}

    cfg = replace(CONFIG, eval_every=1, keep_checkpoints=1, result=Result.best, log_every=4)
    training = Training(root, mesh, cfg, measure)
    end = training.run("best")
    assert (end.step, training.best_weights.best_step, training.best_weights.best_loss) == (6, 2, 2.0)
    assert sorted(path.name for path in (root / "best").glob("step_*")) == ["step_0000002", "step_0000006"]
    assert all(value.equal(reached[1][key]) for key, value in training.weights().items())
    assert not all(value.equal(reached[5][key]) for key, value in training.weights().items())
    assert [training.metrics[step][EVAL_LOSS] for step in range(6)] == [3.0, 2.0, 2.5, 4.0, 3.0, 2.2]
    assert json.loads((root / "best" / "latest.json").read_text()) == {"step": 6}


@pytest.mark.parametrize(
    "scenario",
    [
        _nan_is_skipped,
        _spike_goes_back,
        _spike_takes_back_all_that_trains,
        _weights_that_are_not_finite_are_not_saved,
        _a_loss_that_is_not_finite_is_never_the_best,
        _bad_steps_in_a_row_are_counted_over_a_restart,
        _best_is_the_result,
    ],
)
def test_the_loop_survives(scenario: Callable[..., None], root: Path, tmp_path: Path) -> None:
    run_ranks(scenario, 1, tmp_path, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guards")
    save_tiny(CASE, root / "teacher")
    save_tiny(CASE, root / "student", num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    return root


def step_of(number: int, metrics: dict[str, float]) -> Step:
    return Step(number=number, model=None, batches=[], metrics=metrics)  # type: ignore[arg-type]


def test_steps_in_a_row_are_counted() -> None:
    guard = NonFiniteSteps(limit=2)
    bad, good = {"train/loss": 1.0, "train/grad_norm": math.inf}, {"train/loss": 1.0, "train/grad_norm": 1.0}
    assert [guard.should_skip(step_of(i, values)) for i, values in enumerate([bad, bad, good, bad, bad])] == [
        True, True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(NumericsError, match=r"step 5: train/grad_norm is inf for the 3th step in a row.*skip_limit=2"):
        guard.should_skip(step_of(5, bad))
    assert guard.skipped == 5


def test_a_spike_is_told_by_the_median() -> None:
    spikes = LossSpikes(2.0, limit=5)

    def is_spike(loss: float, of: LossSpikes = spikes) -> bool:
        return of.must_rewind(step_of(len(of.losses), {LOSS: loss}))

    assert not any(is_spike(loss) for loss in [9, 1, 1, 1, 1, 1, 1])
    assert not is_spike(100.0)  # fewer than FEWEST came before
    assert not is_spike(2.0) and is_spike(2.01)
    assert not is_spike(math.nan)
    assert list(spikes.losses) == [9, 1, 1, 1, 1, 1, 1, 100.0, 2.0]
    tolerant = LossSpikes(None, limit=5)
    tolerant.load_state(spikes.state())
    assert not is_spike(1e9, tolerant)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"distill.result=best needs distill.eval_every"):
        DistillConfig(result=Result.best)
    with pytest.raises(ConfigError, match=r"distill.spike_factor=1 must be > 1"):
        DistillConfig(spike_factor=1)
    for name in ("eval_every", "eval_tokens", "peak_tflops", "loss_memory_mib"):
        with pytest.raises(ConfigError, match=rf"distill.{name}=0 must be > 0"):
            DistillConfig(**{name: 0})
    for name in ("skip_limit", "spike_limit"):
        with pytest.raises(ConfigError, match=rf"distill.{name}=-1 must be >= 0"):
            DistillConfig(**{name: -1})
