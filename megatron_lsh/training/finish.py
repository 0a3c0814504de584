"""The end of a complete run: what was reached, a plot, a sample, what LSH saved."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_lsh.config import required
from megatron_lsh.data.samples.prompts import prompt_ids
from megatron_lsh.errors import DataError
from megatron_lsh.inference.generate import Sampling, generate
from megatron_lsh.observing.plot import plot_losses
from megatron_lsh.observing.summary import closing_lines
from megatron_lsh.training.run import Run


def closing_report(run: Run) -> None:
    """Print it on the rank that reports. Collective, because the sample is."""
    reporter, cfg = run.reporter, run.cfg
    sample, more = _sample(run), _more(run)
    if not reporter.writes:
        return
    lines = []
    losses = reporter.validation
    if losses:
        (first, before), (last, after) = losses[0], losses[-1]
        lines.append(
            f"validation loss: {after:.4f} at iteration {last}"
            + (f" (it was {before:.4f} at iteration {first})" if first != last else "")
        )
    best = None if run.best_weights is None else str(run.best_weights.folder)
    places = {"checkpoints": cfg.checkpoint.save, "weights of the best epoch": best}
    places |= {"metrics": cfg.logging.metrics_jsonl, "loss plot": _plot(run)}
    places["TensorBoard"] = cfg.logging.tensorboard_dir and f"tensorboard --logdir {cfg.logging.tensorboard_dir}"
    places |= more
    lines += [f"{name}: {place}" for name, place in places.items() if place]
    if sample is not None:
        lines += ["sample:", *("  | " + line for line in sample.splitlines())]
    lines += closing_lines(cfg, reporter.payload)
    for line in lines:
        reporter.print(line)


def closing_result(run: Run) -> None:
    """The last line of a run that is judged by more than a loss: its best validation, and its test."""
    outcomes, watcher = run.reporter.outcomes, run.early_stopping
    if not outcomes:
        return
    if run.cfg.training.skip_train:
        watcher = None  # a loaded one knows the best of the training, which is not what was evaluated now
    best = watcher.best if watcher is not None else outcomes.get("validation", {})
    parts = []
    if best:
        parts.append(f"validation {_in_words(best)}")
        if watcher is not None and watcher.best_iteration is not None:
            parts[-1] += f" (the best {watcher.figure.replace('_', ' ')}, after iteration {watcher.best_iteration})"
    if "test" in outcomes:
        parts.append(f"test {_in_words(outcomes['test'])}")
        if run.best_weights is None and not run.cfg.training.skip_train:
            parts[-1] += " (with the last weights: --save would have kept the best)"
    run.reporter.print(f"result: {'; '.join(parts)}")


def _in_words(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def _plot(run: Run) -> str | None:
    """Path of the loss plot beside --metrics-jsonl, or why there is none."""
    metrics = run.cfg.logging.metrics_jsonl
    if metrics is None:
        return None
    try:
        return str(plot_losses(metrics))
    except Exception as error:  # a picture is no reason for a finished run to fail
        return f"not drawn: {error}"


def _more(run: Run) -> dict[str, str]:
    """What the family leaves; why not, where that fails, which is no reason for a finished run to."""
    closing = run.family.closing
    if closing is None:
        return {}
    with run.telemetry.paused():
        try:
            return dict(closing(run.cfg, run.model, run.datasets, run.ctx))
        except DataError as error:
            return {"more": f"not written: {error}"}


def _sample(run: Run) -> str | None:
    """Prompt and continuation, or None without --sample-prompt."""
    prompt, tokenizer = run.cfg.logging.sample_prompt, run.tokenizer
    if prompt is None or tokenizer is None:
        return None
    tokens = prompt_ids(tokenizer, prompt)
    with run.telemetry.paused():
        new = generate(
            run.model,
            tokens,
            run.ctx,
            vocab_size=tokenizer.vocab_size,
            context_length=required(run.cfg.model.seq_length),
            eod=tokenizer.eod,
            sampling=Sampling(max_new_tokens=run.cfg.logging.sample_tokens, seed=run.cfg.training.seed),
        )
    return tokenizer.detokenize(tokens + new)
