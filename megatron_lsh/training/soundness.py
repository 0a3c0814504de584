"""Ends of a run whose model is of no use: weights that are not finite, steps that are all skipped."""

from __future__ import annotations

from megatron_lsh.checkpoint import Standing
from megatron_lsh.errors import MegatronLSHError
from megatron_lsh.observing.state import TrainState
from megatron_lsh.parallel.agreement import failed_everywhere, together
from megatron_lsh.training.run import Run


def standing(state: TrainState, complete: bool = False) -> Standing:
    """What a save of this moment may do to other checkpoints. `complete`: no step will follow that could show its worth."""
    if state.doubtful:
        return Standing.DOUBTFUL
    return Standing.SOUND if complete else Standing.FRESH


def check_weights(run: Run) -> None:
    """Raise CheckpointError on all ranks if a weight is not finite on any: whatever follows would be NaN. Collective."""
    together(run.ctx, lambda: run.checkpoints.check_finite(run.model, run.state.iteration))


def stop_if_never_finite(run: Run) -> None:
    """Raise after --max-consecutive-nan-iterations."""
    state, limit = run.state, run.cfg.training.max_consecutive_nan_iterations
    if state.consecutive_nan_iterations >= limit:
        raise _useless(
            run,
            f"the loss or a gradient was not finite in {state.consecutive_nan_iterations} iterations in a row, up to "
            f"iteration {state.iteration} (--max-consecutive-nan-iterations {limit}). None of them changed the model",
        )


def refuse_useless_end(run: Run, complete: bool) -> None:
    """Raise where a run ends that is no success: it changed nothing, or it is `complete` and its last steps were skipped."""
    state = run.state
    if state.unchanged:
        raise _useless(
            run,
            f"the loss or a gradient was not finite in any of the {state.iteration - state.started_at} iterations since the "
            f"start of this run: the model is what it was, and nothing was saved after iteration {state.started_at}",
        )
    if complete and state.doubtful:
        raise _useless(
            run,
            f"the loss or a gradient was not finite in the last iterations ({state.consecutive_nan_iterations}) of the run, "
            "so its model may be spoilt",
        )


def _useless(run: Run, what: str) -> MegatronLSHError:
    last_done = run.state.iteration - run.state.consecutive_nan_iterations
    back = together(run.ctx, lambda: run.checkpoints.way_back(last_done))
    return failed_everywhere(
        f"{what}; {back}. Resume with a lower --lr, a longer warm-up or a smaller --clip-grad, and look at the data around "
        f"sample {run.state.consumed_samples}"
    )
