"""The training run, from process groups to the closing report. Reads top to bottom."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import islice

from megatron_lsh.config import Config, required
from megatron_lsh.families import Family
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.observing.state import StepResult, TrainState
from megatron_lsh.parallel.agreement import together
from megatron_lsh.parallel.data_parallel import counted_parameters, global_norm
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.evaluate import evaluate
from megatron_lsh.training.faults import StopRequest
from megatron_lsh.training.finish import closing_report, closing_result
from megatron_lsh.training.profiling import Profiling
from megatron_lsh.training.run import Run, set_up
from megatron_lsh.training.soundness import check_weights, refuse_useless_end, standing, stop_if_never_finite
from megatron_lsh.training.startup import introduce, set_determinism
from megatron_lsh.training.watch import SAVING, TRAINING, Place, Watch
from megatron_lsh.training.watchdogs import MemoryHistory, arm_flight_recorder, dump_flight_recorder


def train(cfg: Config, family: Family) -> TrainState:
    """Train as `cfg` (validated) says, on the ranks that torchrun started; returns where the run ended.

    A signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2), the death of torchrun, --exit-duration-in-mins and --exit-interval
    end it early and in order: save, then return.

    Raises:
        MegatronLSHError: on every rank, for whatever a user can mend.
    """
    started = time.monotonic()
    set_determinism(cfg)
    stop = StopRequest(cfg.training, started)
    arm_flight_recorder(cfg.logging, os.environ)
    ctx = initialize(cfg.parallel, moe=cfg.moe.num_experts is not None)
    introduce(cfg, ctx)
    place = Place(stage=ctx.pp.rank if ctx.pp.size > 1 else None)
    timeout = timedelta(minutes=cfg.parallel.distributed_timeout_minutes)
    record = partial(dump_flight_recorder, cfg.logging, ctx.rank)
    with Watch(ctx, stop, timeout, place, record=record), MemoryHistory(cfg.logging, ctx):
        run = set_up(cfg, family, ctx, place)
        with stop:
            _work(run, stop)
            place.enter(SAVING, run.state.iteration)
            together(ctx, run.checkpoints.wait)
        run.reporter.close()
    shutdown(ctx)
    return run.state


def _work(run: Run, stop: StopRequest) -> None:
    """Train and report, or only evaluate."""
    if run.cfg.training.skip_train:
        _evaluate(run, "validation", stop, final=True)
        _evaluate(run, "test", stop, final=True)
        closing_result(run)
    elif _iterate(run, stop):
        _evaluate(run, "test", stop, final=True, weights=_take_best_weights(run))
        run.place.enter("closing report", run.state.iteration)
        closing_report(run)
        closing_result(run)


def _iterate(run: Run, stop: StopRequest) -> bool:
    """All iterations that are left, with their log lines, evaluations and checkpoints. False if ended early."""
    cfg, state, reporter = run.cfg, run.state, run.reporter
    total, batch = reporter.figures.train_iters, reporter.figures.global_batch_size
    since_report, save_due = 0, False
    state.start()
    if state.evaluation_due and not _catch_up(run, stop):
        return False
    if state.iteration >= total or run.stopped_early:
        reporter.print(f"> nothing left to train: {_why_complete(run)}")
        refuse_useless_end(run, complete=True)
        return True
    with run.batches("train", state.consumed_samples) as batches, Profiling(cfg, run.ctx) as profiling:
        reporter.watch.lap()
        while state.iteration < total and not run.stopped_early:
            run.place.enter(TRAINING, state.iteration + 1)
            profiling.before(state.iteration)
            result = run.step(batches, state.iteration, stop.requested)
            state.advance(result, batch)
            if not result.skipped:
                run.checkpoints.worked()
            profiling.after(state.iteration)
            since_report += 1
            reporter.step(state, result, run.step.schedule.learning_rate)
            if state.iteration % cfg.logging.log_interval == 0:
                _report(run, result, since_report)
                since_report = 0
            stop_if_never_finite(run)

            ends = state.iteration == total
            save_due = save_due or _multiple(state.iteration, cfg.checkpoint.save_interval)
            state.evaluation_due = run.evaluates("valid") and (ends or run.at_evaluation)
            if result.skipped or ends or state.evaluation_due:
                check_weights(run)
            if state.evaluation_due and not result.stop:
                state.evaluation_due = not _evaluate(run, "validation", stop, final=ends)
                ends = ends or run.stopped_early
            stopped = result.stop or state.evaluation_due  # an evaluation that is still due was broken off
            complete = ends and not state.evaluation_due
            leaves = not complete and (stopped or _multiple(state.iteration, cfg.training.exit_interval))
            if ends or leaves or (save_due and not state.doubtful):
                _save(run, complete and not result.skipped)
                save_due = False
            if ends or leaves:
                refuse_useless_end(run, complete)
            if leaves:
                _tell_end(run, stop.reason if stopped else "reached --exit-interval")
                return False
    return True


def _catch_up(run: Run, stop: StopRequest) -> bool:
    """Make the validation that a stopped run left to this one. False if this one is told to stop as well."""
    state, ends = run.state, run.state.iteration >= run.reporter.figures.train_iters
    state.evaluation_due = not _evaluate(run, "validation", stop, final=ends)
    if state.evaluation_due:
        _tell_end(run, stop.reason)
    elif ends or run.stopped_early:
        _save(run, complete=True)  # nothing else will note that it was made
    return not state.evaluation_due


def _tell_end(run: Run, why: str) -> None:
    later = "; the validation due there is left to the run that resumes" if run.state.evaluation_due else ""
    total = run.reporter.figures.train_iters
    run.reporter.print(f"> {why}: stopped after iteration {run.state.iteration} of {total}{later}")


def _why_complete(run: Run) -> str:
    training, state = run.cfg.training, run.state
    if run.stopped_early:
        return f"--early-stopping-patience ended this run after iteration {state.iteration}"
    if training.train_samples is not None:
        return (
            f"the checkpoint has seen {state.consumed_samples} samples, and --train-samples is {training.train_samples}"
        )
    return f"the checkpoint is at iteration {state.iteration}, and the run has {run.reporter.figures.train_iters}"


def _report(run: Run, result: StepResult, iterations: int) -> None:
    """Gather the figures of a log interval from all ranks and write them."""
    cfg, ctx = run.cfg, run.ctx
    layers = run.telemetry.collect(ctx, iterations) if cfg.moe.num_experts is not None else []
    norm = float(global_norm(counted_parameters(run.model), ctx)) if cfg.logging.log_params_norm else None
    alone = ctx.ep.size == 1 or ctx.pp.size > 1  # stages wait for one another elsewhere, too
    waited = None if alone or not layers else run.telemetry.waited_ms
    run.reporter.interval(run.state, result, run.step.schedule.learning_rate, iterations, layers, norm, waited)
    run.state.start_interval()


def _evaluate(run: Run, name: str, stop: StopRequest, *, final: bool, weights: int | None = None) -> bool:
    """Loss on the "validation" or "test" set, written to all outputs. False if some rank was told to stop meanwhile.

    `weights`: the iteration after which the model had the weights that it has, if it is not the last one.
    """
    split = "valid" if name == "validation" else name
    if not run.evaluates(split):
        return True
    whole = run.family.judge is not None
    # The model runs as in the iteration just done; a run that only evaluates has none and must be told.
    run.model.set_iteration(max(run.state.iteration - 1, 0), run.step.total_iterations)
    run.place.enter(f"{name} evaluation", run.state.iteration)
    outcomes: dict[str, dict[str, float]] = {}
    for dispatch in _dispatches(run):
        exactly = exact_dispatch(run.model) if dispatch == "exact" else nullcontext()
        with run.reporter.watch.paused(), run.telemetry.paused(), exactly:
            figures = _figures(run, split, stop, whole)
        if figures is None:
            return False
        outcomes[dispatch] = figures
    if not whole:
        losses = {dispatch: figures["loss"] for dispatch, figures in outcomes.items()}
        run.reporter.evaluation(run.state.iteration, name, losses, final=final)
        return True
    after = run.state.iteration if weights is None else weights
    best = run.early_stopping
    epoch = run.epoch if weights is None or best is None else best.best_epoch
    run.reporter.figures_of(name, outcomes, run.state.iteration, after, None if run.cfg.training.skip_train else epoch)
    if name == "validation" and not run.cfg.training.skip_train:
        _watch(run, next(iter(outcomes.values())))
    return True


def _figures(run: Run, split: str, stop: StopRequest, whole: bool) -> dict[str, float] | None:
    """What an evaluation on the `whole` set, or on --eval-iters global batches of it, finds; None if told to stop."""
    some = None if whole else run.cfg.training.eval_iters * run.step.micro_batches
    with run.batches(split) as batches:
        return evaluate(run.step.pipeline, run.judge, islice(batches, some), lambda: stop.requested)


def _watch(run: Run, figures: dict[str, float]) -> None:
    """Early stopping: keep the weights if this validation is the best so far, and say so when it is time to end."""
    watcher, iteration = run.early_stopping, run.state.iteration
    if watcher is None:
        return
    better = watcher.observe(iteration, figures, run.epoch)
    keeper = run.best_weights
    if better and keeper is not None:
        with run.reporter.watch.paused():
            together(run.ctx, lambda: keeper.save(run.checkpoint_state(), standing(run.state)))
    if watcher.stopped:
        run.reporter.print(
            f"> no better {watcher.figure} in {watcher.waited} epochs (--early-stopping-patience): stopped after iteration "
            f"{iteration}; the best was {watcher.best[watcher.figure]:.4f} after iteration {watcher.best_iteration}"
        )


def _take_best_weights(run: Run) -> int | None:
    """Put the weights of the best validation into the model, unless it has them already; returns their iteration."""
    watcher, keeper = run.early_stopping, run.best_weights
    if watcher is None or keeper is None or watcher.best_iteration in (None, run.state.iteration):
        return None
    best = required(watcher.best_iteration)
    if together(run.ctx, lambda: keeper.load(run.checkpoint_state(), best)):
        return best
    run.reporter.print(
        f"WARNING: the weights of the best validation, of iteration {best}, are not in {keeper.folder}: the last ones are "
        "tested"
    )
    return None


def _dispatches(run: Run) -> list[str]:
    """--lsh-eval: how rows travel in each evaluation to make, "as trained" or "exact"."""
    cfg = run.cfg
    lossless = cfg.moe.moe_token_dispatcher_type in ("alltoall", "allgather") and cfg.lsh.lsh_wire_dtype is None
    if lossless or cfg.moe.num_experts is None:
        return ["as trained"]
    return {"on": ["as trained"], "off": ["exact"], "both": ["as trained", "exact"]}[cfg.lsh.lsh_eval]


def _save(run: Run, complete: bool) -> None:
    if run.cfg.checkpoint.save is None or run.state.unchanged:
        return
    run.place.enter(SAVING, run.state.iteration)
    with run.reporter.watch.paused():
        together(run.ctx, lambda: run.checkpoints.save(run.checkpoint_state(), standing(run.state, complete)))


def _multiple(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
