"""The training loop of distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from torch import Tensor

from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.distill.step import forward_backward
from compactlm_nemo.distill.teacher import Teacher
from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.training.batches import BatchFeed
from compactlm_nemo.training.callbacks import Callback, Step
from compactlm_nemo.training.checkpoint import Checkpoints, TrainState
from compactlm_nemo.training.optimizer import TrainableModel
from compactlm_nemo.training.wandb_run import BATCH


def distill(
    student: ModelChunks,
    teacher: Teacher,
    sample: Callable[[int], Tensor],
    cfg: DistillConfig,
    callbacks: Sequence[Callback],
    *,
    checkpoints: Checkpoints,
) -> TrainState:
    """Train the student from the newest checkpoint, or the start, to the last of `cfg.steps`. Collective.

    Args:
        sample: ``[S + 1]`` tokens of a sample of the training order; called by a thread beside the steps.
        callbacks: The optional parts, called in this order; see `Callback`.
    Returns:
        The state in which training ends, which a callback may have stopped earlier.
    """
    model = TrainableModel(student.train(), cfg, overlap=cfg.overlap)
    state = _start(model, callbacks, checkpoints)
    is_over = _is_over(state, cfg, callbacks)
    with closing(BatchFeed(sample, cfg, student.mesh)) as feed, checkpoints.finished():
        while not is_over:
            for callback in callbacks:
                callback.before_step(state.step)
            model.advance_schedule()
            number = state.step + state.skipped_batches
            batches = feed.batches(number)
            teacher.expect(feed.samples(number) + feed.samples(number + 1))
            step = Step(number=state.step, model=model, batches=batches)
            step.metrics |= forward_backward(
                model.ddps, teacher, batches, loss=cfg.loss, temperature=cfg.temperature, callbacks=callbacks
            )
            if any([callback.must_rewind(step) for callback in callbacks]):
                state = _rewind(state, model, callbacks, checkpoints)
                continue
            grad_norm = model.gradient_norm()
            step.metrics |= {"train/grad_norm": grad_norm, "train/lr": model.lr, BATCH: float(number)}
            if not any([callback.should_skip(step) for callback in callbacks]):
                model.update(grad_norm)
                for callback in callbacks:
                    callback.after_update(step)
            state.step += 1
            step.is_last = is_over = _is_over(state, cfg, callbacks)
            for callback in callbacks:
                callback.after_step(step)
            if step.is_last or step.must_save or state.step % cfg.checkpoint_every == 0:
                checkpoints.save(model, state, callbacks)
            else:
                checkpoints.finish_if_written()
    if state.step == cfg.steps:
        for callback in callbacks:
            callback.after_training(model)
    return state


def _start(model: TrainableModel, callbacks: Sequence[Callback], checkpoints: Checkpoints) -> TrainState:
    """Return the newest checkpoint's state, loaded; without one that of a new training, saved where a callback asks."""
    if checkpoints.latest_step() is not None:
        return checkpoints.load(model, callbacks)
    state = TrainState()
    if any(callback.needs_initial_checkpoint for callback in callbacks):
        checkpoints.save(model, state, callbacks)
    return state


def _is_over(state: TrainState, cfg: DistillConfig, callbacks: Sequence[Callback]) -> bool:
    """Return whether no step is to follow; every callback is asked once a step."""
    must_stop = any([callback.must_stop(state.step) for callback in callbacks])
    return must_stop or state.step >= cfg.steps


def _rewind(
    state: TrainState, model: TrainableModel, callbacks: Sequence[Callback], checkpoints: Checkpoints
) -> TrainState:
    """Return the state of the newest checkpoint, loaded, with the batches since then passed over."""
    next_batch = state.step + state.skipped_batches + 1
    saved = checkpoints.load(model, callbacks)
    return TrainState(step=saved.step, skipped_batches=next_batch - saved.step)
