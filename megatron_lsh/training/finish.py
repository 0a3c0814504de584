"""The end of a complete run: what was reached, a plot, a sample, what LSH saved."""

from __future__ import annotations

from megatron_lsh.training.generate import Sampling, generate
from megatron_lsh.training.plot import plot_losses
from megatron_lsh.training.run import Run, required
from megatron_lsh.training.summary import closing_lines


def closing_report(run: Run) -> None:
    """Print it on the rank that reports. Collective, because the sample is."""
    reporter, cfg = run.reporter, run.cfg
    sample = _sample(run)
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
    places = {"checkpoints": cfg.checkpoint.save, "metrics": cfg.logging.metrics_jsonl, "loss plot": _plot(run)}
    places["TensorBoard"] = cfg.logging.tensorboard_dir and f"tensorboard --logdir {cfg.logging.tensorboard_dir}"
    lines += [f"{name}: {place}" for name, place in places.items() if place]
    if sample is not None:
        lines += ["sample:", *("  | " + line for line in sample.splitlines())]
    lines += closing_lines(cfg, reporter.history)
    for line in lines:
        reporter.print(line)


def _plot(run: Run) -> str | None:
    """Path of the loss plot beside --metrics-jsonl, or why there is none."""
    metrics = run.cfg.logging.metrics_jsonl
    if metrics is None:
        return None
    try:
        return str(plot_losses(metrics))
    except (ImportError, ValueError, OSError) as error:
        return f"not drawn: {error}"


def _sample(run: Run) -> str | None:
    """Prompt and continuation, or None without --sample-prompt."""
    prompt = run.cfg.logging.sample_prompt
    if prompt is None:
        return None
    tokens = run.tokenizer.tokenize(prompt) or [run.tokenizer.eod]
    with run.telemetry.paused():
        new = generate(
            run.model,
            tokens,
            run.ctx,
            vocab_size=run.tokenizer.vocab_size,
            context_length=required(run.cfg.model.seq_length),
            eod=run.tokenizer.eod,
            sampling=Sampling(max_new_tokens=run.cfg.logging.sample_tokens, seed=run.cfg.training.seed),
        )
    return run.tokenizer.detokenize(tokens + new)
