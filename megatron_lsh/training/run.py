"""Everything that exists before the first iteration, made in an order in which mistakes show early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
from torch import nn

from megatron_lsh.checkpoint import CheckpointManager, LoadResult, TrainingState
from megatron_lsh.config import Config, padded_vocab_size, required, to_saved
from megatron_lsh.config.kept_tokenizer import KEPT, tokenizer_contents
from megatron_lsh.data.loader import BatchIterator, Datasets
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import DataError
from megatron_lsh.families import Family, Judge
from megatron_lsh.families.scores import LossJudge
from megatron_lsh.models.model import Model
from megatron_lsh.moe.compressors.lsh import ClusterByHash
from megatron_lsh.moe.rates import LayerRates
from megatron_lsh.moe.schedule import restore_decisions, save_decisions, trials
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.observing.reporter import Reporter, RunFigures
from megatron_lsh.observing.state import TrainState
from megatron_lsh.parallel.agreement import together
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import shard_model
from megatron_lsh.parallel.random import derive_seed, get_rng_state, seed_everything, set_rng_state
from megatron_lsh.plan.flops import experts_share, peak_flops, training_flops
from megatron_lsh.training.early_stopping import BestWeights, EarlyStopping
from megatron_lsh.training.loss_scale import LossScale
from megatron_lsh.training.optimizer import build_optimizer
from megatron_lsh.training.pipeline import HiddenStates, Pipeline
from megatron_lsh.training.schedule import Schedule, schedule_shape
from megatron_lsh.training.startup import describe_dispatch, describe_model, save_config, take_save_folder
from megatron_lsh.training.step import Step
from megatron_lsh.training.upcycling import start_from_dense
from megatron_lsh.training.watch import Place


@dataclass
class Run:
    """A run, ready to train. Each part is the same object for the whole life of the process."""

    cfg: Config
    family: Family
    ctx: ParallelContext
    tokenizer: Tokenizer | None
    """None for a family whose samples are no text"""
    tokenizer_contents: Mapping[str, bytes]
    """its files by name, which every checkpoint holds; on rank 0, else empty"""
    datasets: Datasets
    telemetry: MoETelemetry
    model: Model
    step: Step
    state: TrainState
    checkpoints: CheckpointManager
    judge: Judge
    """what evaluations find out"""
    early_stopping: EarlyStopping | None
    """watches the validations; None for a family that is judged by its loss alone"""
    best_weights: BestWeights | None
    """where the weights of the best validation are kept; None without early stopping, --save or training"""
    reporter: Reporter
    place: Place
    """where the run is, for whoever watches over it"""

    @property
    def stopped_early(self) -> bool:
        """Whether the validations say that more training is of no use."""
        return self.early_stopping is not None and self.early_stopping.stopped

    @property
    def epoch(self) -> float | None:
        """How often the training data has been seen; None where a run is not counted in epochs."""
        per_epoch = self.family.samples_per_epoch
        if per_epoch is None:
            return None
        return self.state.consumed_samples / per_epoch(required(self.cfg.training.global_batch_size))

    @property
    def at_evaluation(self) -> bool:
        """Whether a validation follows the iteration just done: at the end of an epoch, or by --eval-interval."""
        if self.epoch is not None:
            return self.epoch == int(self.epoch)
        interval = self.cfg.training.eval_interval
        return interval is not None and self.state.iteration % interval == 0

    def evaluates(self, name: str) -> bool:
        """Whether there is a "valid" or "test" set, and something to find out about it."""
        wanted = self.cfg.training.eval_iters > 0 or self.family.judge is not None
        return wanted and getattr(self.datasets, name) is not None

    def batches(self, name: str, consumed_samples: int = 0) -> BatchIterator:
        """This rank's micro-batches of the "train", "valid" or "test" set. Raises DataError if there is no such set."""
        dataset = getattr(self.datasets, name)
        if dataset is None:
            raise DataError(f"there is no {name} set: give it a share in --split, or a --{name}-data-path")
        return BatchIterator(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=required(self.cfg.training.micro_batch_size),
            dp_rank=self.ctx.dp.rank,
            dp_size=self.ctx.dp.size,
            num_workers=self.cfg.data.num_workers,
            pin_memory=self.ctx.device.type == "cuda",
        )

    def checkpoint_state(self) -> TrainingState:
        """What a checkpoint of this moment holds."""
        train = self.datasets.train
        return TrainingState(
            model=self.model,
            optimizer=self.step.optimizer,
            schedule=self.step.schedule,
            progress=self.state.state_dict(),
            config=to_saved(self.cfg),
            rng=get_rng_state(),
            extra={
                "data": train.fingerprint() if train is not None else None,
                "lsh_seed": self.cfg.lsh.lsh_seed,
                "loss_scale": self.step.loss_scale.state_dict(),
                "auto_dispatcher": save_decisions(self.model),
                "lsh_rates": None if self.step.rates is None else self.step.rates.state_dict(),
                "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            },
            padded_rows=dict.fromkeys(_vocabulary_parameters(self.model), self.cfg.model.vocab_size or 0),
            fresh=self.family.fresh_parameters(self.cfg),
            renewed=self.family.renewed_parameters,
            unused=self.family.unused_parameters,
            resized=self.family.resized_parameters,
            files={f"{KEPT}/{name}": content for name, content in self.tokenizer_contents.items()}
            | (dict(self.family.files) if self.ctx.rank == 0 else {}),
        )


def set_up(cfg: Config, family: Family, ctx: ParallelContext, place: Place | None = None) -> Run:
    """Tokenizer, data, model, optimizer, checkpoint, outputs. Collective. `place`: where the run says what it is doing.

    Raises:
        ConfigError, DataError, CheckpointError: on all ranks if on any.
    """
    place = place or Place()
    lock = together(ctx, lambda: take_save_folder(cfg, ctx))  # before anything is read or built, and long before saving
    place.enter("reading the data", 0)
    tokenizer, padded = _vocabulary(cfg, family, ctx)
    keep = tokenizer is not None and ctx.rank == 0
    contents = together(ctx, lambda: tokenizer_contents(cfg.data) if keep else {})
    batch = required(cfg.training.global_batch_size)
    planned = cfg.training.train_samples or required(cfg.training.train_iters) * batch
    datasets = together(ctx, lambda: family.datasets(cfg, tokenizer, ctx, _samples(cfg, planned)))
    place.enter("building the model", 0)
    telemetry = MoETelemetry(ctx.device)
    model = together(ctx, lambda: family.build(cfg, padded, ctx, telemetry))
    shard_model(model, ctx, cfg.precision)
    describe_model(model, cfg.model.vocab_size, padded, ctx)
    describe_dispatch(cfg, ctx)
    reporter = Reporter(cfg.logging, ctx, _figures(cfg, family, ctx, padded), cfg.moe.moe_per_layer_logging, cfg.lsh)
    step = _step(cfg, family, model, reporter)
    checkpoint = start_from_dense(cfg, ctx)
    timeout = timedelta(minutes=cfg.parallel.distributed_timeout_minutes)
    if cfg.training.skip_train:
        checkpoint = replace(checkpoint, save=None)  # a run that only evaluates may look at one that trains
    checkpoints = together(
        ctx,
        lambda: CheckpointManager(checkpoint, ctx, timeout=timeout, lock=lock, log_progress=cfg.logging.log_progress),
    )
    criterion = family.criterion(cfg)
    best_weights = None
    if criterion is not None and checkpoint.save is not None and not cfg.training.skip_train:
        best_weights = together(ctx, lambda: BestWeights(checkpoint, ctx, timeout, lock))
    run = Run(
        cfg=cfg,
        family=family,
        ctx=ctx,
        tokenizer=tokenizer,
        tokenizer_contents=contents,
        datasets=datasets,
        telemetry=telemetry,
        model=model,
        step=step,
        state=TrainState(),
        checkpoints=checkpoints,
        judge=LossJudge(step.forward_step) if family.judge is None else family.judge(cfg),
        early_stopping=None if criterion is None else EarlyStopping(criterion.figure, criterion.patience),
        best_weights=best_weights,
        reporter=reporter,
        place=place,
    )
    place.enter("loading a checkpoint", 0)
    _restore(run)
    together(ctx, lambda: save_config(cfg, ctx))
    needed = run.state.consumed_samples + (run.reporter.figures.train_iters - run.state.iteration) * batch
    if needed > planned:  # the checkpoint is of a run with larger batches: later samples than planned will be read
        run.datasets = together(ctx, lambda: family.datasets(cfg, tokenizer, ctx, _samples(cfg, needed)))
    settings = to_saved(cfg)["config"]
    trains = not cfg.training.skip_train
    together(ctx, lambda: run.reporter.open(run.state.iteration, settings, cfg.checkpoint.save, trains=trains))
    return run


def _vocabulary(cfg: Config, family: Family, ctx: ParallelContext) -> tuple[Tokenizer | None, int]:
    """(tokenizer, size of the padded vocabulary), or (None, 0); the size before padding becomes part of `cfg`.

    Which ids are padding must be known to the model, and to whoever loads it later.
    """
    build = family.tokenizer
    if build is None:
        return None, 0
    tokenizer = together(ctx, lambda: build(cfg))
    cfg.model.vocab_size = max(cfg.model.vocab_size or 0, tokenizer.vocab_size)
    return tokenizer, padded_vocab_size(cfg.model.vocab_size, cfg.model.make_vocab_size_divisible_by, ctx.tp.size)


def _step(cfg: Config, family: Family, model: Model, reporter: Reporter) -> Step:
    ctx = reporter.ctx
    optimizer = together(ctx, lambda: build_optimizer(model, cfg.optimizer, cfg.precision.bf16))
    schedule = Schedule(
        optimizer,
        schedule_shape(cfg.optimizer, cfg.training),
        override=cfg.optimizer.override_opt_param_scheduler,
        use_checkpoint=cfg.optimizer.use_checkpoint_opt_param_scheduler,
    )
    batch = required(cfg.training.global_batch_size)
    return Step(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        forward_step=partial(family.losses, cfg),
        pipeline=Pipeline(model, ctx, HiddenStates.of(cfg, ctx) if ctx.pp.size > 1 else None),
        ctx=ctx,
        micro_batches=batch // (required(cfg.training.micro_batch_size) * ctx.dp.size),
        global_batch_size=batch,
        clip_grad=cfg.optimizer.clip_grad,
        total_iterations=required(cfg.training.train_iters),
        loss_tokens=family.loss_tokens if cfg.training.calculate_per_token_loss else None,
        loss_scale=LossScale.of(cfg.precision),
        rates=_rates(cfg, model),
        tell=reporter.print_of_stage,
    )


def _rates(cfg: Config, model: Model) -> LayerRates | None:
    """What moves them, under --lsh-target-energy."""
    if cfg.lsh.lsh_target_energy is None or cfg.moe.num_experts is None:
        return None
    held = [m.followed for m in model.modules() if isinstance(m, ClusterByHash) and m.followed is not None]
    return LayerRates(cfg.lsh.rates(), sum(cfg.layers_of_stacks()), held)


def _samples(cfg: Config, train: int) -> tuple[int, int, int]:
    """Every evaluation reads the same samples, so that its losses can be compared."""
    evaluated = cfg.training.eval_iters * required(cfg.training.global_batch_size)
    return (0 if cfg.training.skip_train else train), evaluated, evaluated


def _figures(cfg: Config, family: Family, ctx: ParallelContext, padded: int) -> RunFigures:
    batch = required(cfg.training.global_batch_size)
    # Devices are as fast in fp16 as in bf16.
    dtype = torch.bfloat16 if cfg.precision.half else torch.float32
    return RunFigures(
        train_iters=required(cfg.training.train_iters),
        global_batch_size=batch,
        tokens_per_iteration=round(batch * family.tokens_per_sample(cfg)),
        flops_per_iteration=batch * training_flops(family, cfg, padded),
        peak_flops=peak_flops(ctx.device, dtype, cfg.logging.peak_tflops),
        experts_share=experts_share(family, cfg, padded),
        counts_images=family.counts_images,
    )


def _restore(run: Run) -> None:
    """Load what --load or --pretrained-checkpoint name, and seed or restore the generators."""
    result = together(run.ctx, lambda: run.checkpoints.load(run.checkpoint_state()))
    if result is not None and not result.weights_only:
        run.state = TrainState.from_state_dict(result.progress)
        if not run.cfg.checkpoint.load_optim:
            run.step.schedule.move_to(run.state.scheduled_samples)
        elif result.extra.get("loss_scale") is not None and LossScale.follows(result.config.get("precision", {})):
            run.step.loss_scale.load_state_dict(result.extra["loss_scale"])
        _set_length(run, result)
        _compare_data(run, result)
        _restore_dispatchers(run, result)
        if run.step.rates is not None and result.extra.get("lsh_rates") is not None:
            run.step.rates.load_state_dict(result.extra["lsh_rates"], run.state.iteration)
        if run.early_stopping is not None and result.extra.get("early_stopping") is not None:
            run.early_stopping.load_state_dict(result.extra["early_stopping"])
    if result is not None and result.rng is not None:
        set_rng_state(result.rng)
    else:
        seed_everything(derive_seed(run.cfg.training.seed, "training", run.state.iteration), run.ctx)


def _set_length(run: Run, result: LoadResult) -> None:
    """A length in samples or epochs stays what it is under another batch size: iterations follow from what is left."""
    training, state, per_epoch = run.cfg.training, run.state, run.family.samples_per_epoch
    batch = required(training.global_batch_size)
    before = result.config.get("training", {}).get("global_batch_size") or batch
    left = None
    if training.train_samples is not None:
        left = training.train_samples - state.consumed_samples
    elif per_epoch is not None and before != batch:
        epochs = required(training.train_iters) * batch // per_epoch(batch)
        # An epoch is made of whole batches: of a begun one, those that fit into what was seen count.
        done, seen = divmod(state.consumed_samples, per_epoch(before))
        state.consumed_samples = done * per_epoch(batch) + seen // batch * batch
        left = epochs * per_epoch(batch) - state.consumed_samples
    elif per_epoch is not None:
        left = required(training.train_iters) * batch - state.consumed_samples
    if left is not None:
        training.train_iters = state.iteration + max(left, 0) // batch
        run.cfg.derived["train_iters"] = training.train_iters
        run.step = replace(run.step, total_iterations=training.train_iters)
        run.reporter.figures = replace(run.reporter.figures, train_iters=training.train_iters)
    if before != batch:
        total = required(training.train_iters)
        samples = state.consumed_samples + max(total - state.iteration, 0) * batch
        run.reporter.print(
            f"WARNING: the global batch size is {batch}, and was {before} in the checkpoint: the run ends after iteration "
            f"{total}, with {samples} samples"
        )


def _restore_dispatchers(run: Run, result: LoadResult) -> None:
    """What the auto dispatcher found holds for the layout it was measured on."""
    saved = result.extra.get("auto_dispatcher") or {}
    taken = restore_decisions(run.model, saved) if result.same_layout else None
    if taken is None and saved and trials(run.model):
        taken = "auto dispatcher: the parallel layout is not that of the checkpoint, so it measures again"
    if taken is not None:
        run.reporter.print_of_stage(f"> {taken}")


def _compare_data(run: Run, result: LoadResult) -> None:
    before, now = result.extra.get("data"), run.checkpoint_state().extra["data"]
    if before is not None and now is not None and before != now:
        run.reporter.print(
            f"WARNING: the training data (or --split, --seq-length, --seed) is not that of {result.folder}; the run goes "
            f"on with sample {run.state.consumed_samples} of the new data"
        )


def _vocabulary_parameters(model: nn.Module) -> list[str]:
    names = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
    return [name for name, _ in model.named_parameters() if name in names]
