"""Settings of ``finetune_classification.py``, and how its configuration grows out of the one of a pretraining run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from megatron_lsh.config.arguments import FlagParser, parse_args
from megatron_lsh.config.bert import BertConfig
from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.config_file import read_document
from megatron_lsh.config.data import TOKENIZER_SETTINGS
from megatron_lsh.config.flag import flag
from megatron_lsh.config.serialize import is_saved_config
from megatron_lsh.config.settings import named, settings_of
from megatron_lsh.config.t5 import T5Config
from megatron_lsh.errors import ConfigError

BACKBONES = ("gpt", "bert", "t5")
METRICS = ("accuracy", "macro-f1", "f1", "matthews")
_POOLING = MappingProxyType({"gpt": "last", "bert": "first", "t5": "mean"})
_UNKNOWN_LENGTH = 1_000_000  # iterations of an epoch, before the data has been read
# What a pretraining run's config.json says about the model; everything else in it is about that run.
_MODEL_SECTIONS = ("model", "moe", "lsh", "bert", "t5")


@dataclass(frozen=True)
class GlueTask:
    """Columns and official metric of a task of the GLUE benchmark (https://gluebenchmark.com/tasks)."""

    text_keys: tuple[str, ...]
    metric: str
    validation: str = "validation"
    """name of the split; MNLI has two, of the training genres and of others"""


GLUE: Mapping[str, GlueTask] = MappingProxyType(
    {
        "cola": GlueTask(("sentence",), "matthews"),
        "sst2": GlueTask(("sentence",), "accuracy"),
        "mrpc": GlueTask(("sentence1", "sentence2"), "f1"),
        "qqp": GlueTask(("question1", "question2"), "f1"),
        "mnli": GlueTask(("premise", "hypothesis"), "accuracy", "validation_matched"),
        "qnli": GlueTask(("question", "sentence"), "accuracy"),
        "rte": GlueTask(("sentence1", "sentence2"), "accuracy"),
        "wnli": GlueTask(("sentence1", "sentence2"), "accuracy"),
    }
)


@dataclass
class ClassificationSettings:
    """Texts, classes and length of fine-tuning for classification."""

    backbone: str | None = flag(
        None, "Kind of the pretrained model (default: that of the --config file, else gpt)", choices=BACKBONES
    )
    task: str | None = flag(
        None,
        "GLUE task (lower case), which sets columns and metric; without files or --hf-dataset it is downloaded",
        parse=lambda value: str(value).lower(),
        choices=tuple(GLUE),
    )
    train_data: list[str] | None = flag(None, "Files with labelled texts: .jsonl, .csv, .tsv or .tab")
    valid_data: list[str] | None = flag(None, "As --train-data, for the validation after each epoch")
    test_data: list[str] | None = flag(None, "As --train-data, for the test at the end")
    hf_dataset: str | None = flag(None, "Hugging Face data set: a name on the hub, or a folder that datasets saved")
    hf_config: str | None = flag(None, "Configuration of the Hugging Face data set")
    hf_train_split: str = flag("train", "Split of the Hugging Face data set to train on")
    hf_valid_split: str | None = flag(None, "Split to validate on (default: validation)")
    hf_test_split: str | None = flag(None, "Split to test on (absent: no test)")
    text_keys: list[str] | None = flag(
        None,
        "Columns with the text, or with the two texts of a pair (default: text; in .tab files the first text column)",
    )
    label_key: str | None = flag(None, "Column with the class (default: label; in .tab files the class column)")
    classes: list[str] | None = flag(
        None, "Names of the classes, in the order of their numbers (default: those in the training data, sorted)"
    )
    epochs: int = flag(3, "Times to read the training texts; 0 only evaluates (Megatron: no default)", at_least=0)
    early_stopping_patience: int | None = flag(
        None, "End the training after this many epochs without a better validation metric", at_least=1
    )
    classification_metric: str | None = flag(
        None,
        "What the best epoch is best in (default: the task's, else accuracy); f1 is that of the second of two classes",
        choices=METRICS,
    )
    truncate: bool = flag(
        True, "Truncation of texts longer than --seq-length, which are then errors", off="--no-truncate"
    )
    pooling: str | None = flag(
        None,
        "Position whose hidden state is classified, or mean (default: last for gpt, first for bert, mean for t5)",
        choices=("last", "first", "mean"),
    )
    classifier_dropout: float | None = flag(
        None, "Dropout in front of the classification layer (default: --hidden-dropout)", at_least=0, below=1
    )
    zero_shot: bool = flag(False, "Only evaluate a GPT, by how likely it finds each class name after --prompt-template")
    prompt_template: str = flag(
        "{text}\n\nTopic:", "Text in front of the class name with --zero-shot; {text} (and {pair}) is the example"
    )
    class_texts: list[str] | None = flag(
        None, "What the classes are called in --zero-shot, in the order of --classes (default: their names)"
    )


@dataclass
class ClassificationConfig(Config):
    """The configuration of ``finetune_classification.py`` for a GPT.

    ``examples`` is no setting: the number of training texts, from which ``validate`` derives the length of the run. It is
    known when the data has been read; before that a placeholder stands for it.
    """

    indexed_data: ClassVar[bool] = False
    why_no_pipeline: ClassVar[str | None] = (
        "pipeline parallelism is not implemented for classifiers; the checkpoint of a pipeline fits one stage"
    )
    why_no_context_parallel: ClassVar[str | None] = (
        "context parallelism is not implemented for classifiers, whose heads read one position of a text"
    )
    backbone: ClassVar[str] = "gpt"

    finetune: ClassificationSettings = field(default_factory=ClassificationSettings)
    examples: int | None = field(default=None, repr=False, compare=False)

    def derive_own(self, check: Checker, world_size: int) -> None:
        super().derive_own(check, world_size)
        derive_classification(self, check, world_size)

    def check_own(self, check: Checker) -> None:
        super().check_own(check)
        check_classification(self, check)


@dataclass
class BertClassificationConfig(ClassificationConfig, BertConfig):
    """The same for a BERT."""

    backbone: ClassVar[str] = "bert"
    why_no_sample: ClassVar[str | None] = None  # has a rule of its own for every backbone


@dataclass
class T5ClassificationConfig(ClassificationConfig, T5Config):
    """The same for the encoder of a T5."""

    backbone: ClassVar[str] = "t5"
    why_no_sample: ClassVar[str | None] = None

    def layers_of_stacks(self) -> list[int]:
        return Config.layers_of_stacks(self)


_CLASSES: Mapping[str, type[ClassificationConfig]] = MappingProxyType(
    {kind.backbone: kind for kind in (ClassificationConfig, BertClassificationConfig, T5ClassificationConfig)}
)


def parse_classification_args(argv: Sequence[str] | None = None) -> ClassificationConfig:
    """Parse the flags of ``finetune_classification.py``; give the result to ``validate`` next.

    ``--config`` may be the config.json of a pretraining run: it then gives the backbone, the model with its experts and
    dispatcher, and the tokenizer, and nothing else. That of a fine-tuning run, or a YAML file, gives all its settings.

    Raises:
        ConfigError: as ``parse_args``, and for a --backbone that is not that of the file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    early = FlagParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--backbone", "--pretrained-checkpoint"):
        early.add_argument(name)
    known, _ = early.parse_known_args(words)
    saved = _saved_config(known.config)
    backbone = _backbone(known.backbone, known.config, saved)
    config_class = _CLASSES[backbone]
    pretraining = saved is not None and "finetune" not in saved
    cfg = parse_args(
        words, config_class, lambda values: _of_the_model(values, saved, config_class) if pretraining else values
    )
    if pretraining:
        cfg.notices.append(
            f"model, experts, dispatcher and tokenizer are those of {known.config}; its settings of training, optimizer, "
            "parallelism, data, checkpoints and logging are not taken over"
        )
    if cfg.finetune.backbone is None:
        cfg.finetune.backbone = backbone
    if cfg.model.num_layers is None and known.pretrained_checkpoint is not None:
        cfg.notices.append(
            f"add --config {config_beside(known.pretrained_checkpoint)}: it describes the pretrained model"
        )
    return cfg


def config_beside(folder: str) -> str:
    """Where the config.json of a run lies, given its --save folder or one below it (for messages)."""
    for place in (Path(folder), Path(folder).parent):
        if (place / "config.json").is_file():
            return str(place / "config.json")
    return f"{folder}/config.json"


def _saved_config(path: str | None) -> Mapping[str, Any] | None:
    """Sections of a saved config.json; None for no file, or one that a person wrote (which parse_args will read)."""
    document: Any = None if path is None else read_document(path)
    return document["config"] if is_saved_config(document) else None


def _backbone(given: str | None, path: str | None, saved: Mapping[str, Any] | None) -> str:
    if given is not None and given not in BACKBONES:
        raise ConfigError(
            f"{named('finetune.backbone', given)} must be one of {', '.join(BACKBONES)}: change --backbone"
        )
    if saved is None:
        return given or "gpt"
    kind = next((name for name in ("bert", "t5") if name in saved), "gpt")
    if given not in (None, kind):
        raise ConfigError(
            f"finetune.backbone ({given}) must be {kind}, the model of --config {path}: drop --backbone, or give the "
            "config.json of another run"
        )
    return kind


def _of_the_model(values: dict[str, Any], saved: Any, config_class: type[Config]) -> dict[str, Any]:
    """Of a pretraining run's settings those that describe the model."""
    settings = settings_of(config_class)
    kept = {
        name: value
        for name, value in values.items()
        if name in TOKENIZER_SETTINGS or (name in settings and settings[name].section in _MODEL_SECTIONS)
    }
    # Derived from the --seq-length of that run, but the size of a table of weights: a shorter --seq-length keeps it.
    positions = saved.get("model", {}).get("max_position_embeddings")
    return kept | ({} if positions is None else {"max_position_embeddings": positions})


def derive_classification(cfg: ClassificationConfig, check: Checker, world_size: int) -> None:
    """Fill in what the backbone, the task and the number of examples decide."""
    tune, training = cfg.finetune, cfg.training
    check.fill("backbone", cfg.backbone)
    if tune.pooling is None:
        check.fill("pooling", _POOLING[tune.backbone or "gpt"])
    if tune.classification_metric is None:
        check.fill("classification_metric", GLUE[tune.task].metric if tune.task is not None else "accuracy")
    if tune.classifier_dropout is None:
        check.fill("classifier_dropout", cfg.model.hidden_dropout)
    if tune.epochs == 0 or tune.zero_shot:
        check.fill("skip_train", True)
    if training.skip_train and cfg.optimizer.lr is None:
        check.fill("lr", 0.0)
    for name in ("train_iters", "train_samples", "eval_interval"):
        check.rule(
            f"{{{name}}} must not be given", lambda _: False, "set --epochs; a validation follows each epoch by itself"
        )
    _derive_length(cfg, check, world_size)


def _derive_length(cfg: ClassificationConfig, check: Checker, world_size: int) -> None:
    """Epochs -> iterations. An epoch is as many whole global batches as its texts need (data/samples/classification.py)."""
    training, tp = cfg.training, cfg.parallel.tensor_model_parallel_size
    batch = training.global_batch_size or (training.micro_batch_size or 1) * max(world_size // tp, 1)
    per_epoch = _UNKNOWN_LENGTH if cfg.examples is None else max(-(-cfg.examples // batch), 1)
    if training.train_iters is None:
        check.fill("train_iters", per_epoch * max(cfg.finetune.epochs, 1))
    if training.eval_interval is None:
        check.fill("eval_interval", per_epoch)


def check_classification(cfg: ClassificationConfig, check: Checker) -> None:
    """Rules of fine-tuning that single values do not show."""
    tune = cfg.finetune
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        check.rule(
            f"{{{name}}} must not be given",
            lambda _: False,
            f"drop --{name.replace('_', '-')}, and give labelled texts by --train-data or --hf-dataset",
        )
    check.rule(
        "{mock_data} must be off", lambda on: not on, "drop --mock-data, and give labelled texts by --train-data"
    )
    check.rule(
        "{sample_prompt} must not be given to a classifier, which writes no text",
        lambda _: False,
        "drop --sample-prompt",
    )
    check.rule("{moe_use_upcycling} must be off", lambda on: not on, "upcycle with tools/convert_checkpoint.py first")
    for name in ("train_data", "valid_data", "test_data"):
        check.rule(f"{{{name}}} must not be given with {{hf_dataset}}", lambda *_: False, "drop one of them")
    if not cfg.training.dry_run:
        check.required("tokenizer_type")
        _check_sets(cfg, check)
    if tune.hf_dataset is None and tune.task is None:
        for name in ("hf_config", "hf_valid_split", "hf_test_split"):
            check.rule(f"{{{name}}} must not be given", lambda _: False, "set --hf-dataset")
    check.rule("{text_keys} must be one column, or the two of a pair", lambda keys: 1 <= len(keys) <= 2)
    check.rule("{classes} must be different names", lambda names: len(set(names)) == len(names))
    check.rule("{classes} must be at least 2", lambda names: len(names) >= 2)
    check.rule(
        "{early_stopping_patience} must not be given without a folder for the best epoch's weights",
        lambda _: cfg.checkpoint.save is not None or cfg.training.skip_train,
        "set --save",
    )
    _check_zero_shot(cfg, check)


def _check_sets(cfg: ClassificationConfig, check: Checker) -> None:
    """There are texts to train on, or at least to evaluate."""
    tune = cfg.finetune
    if tune.hf_dataset is not None or (
        tune.task is not None and not (tune.train_data or tune.valid_data or tune.test_data)
    ):
        return
    if not cfg.training.skip_train:
        check.required("train_data")
        check.rule(
            "{early_stopping_patience} needs a validation set",
            lambda _: tune.valid_data is not None,
            "set --valid-data",
        )
    elif tune.valid_data is None and tune.test_data is None:
        check.problems.append(
            "finetune.valid_data (absent) must be given: there is nothing to evaluate; set --valid-data"
        )


def _check_zero_shot(cfg: ClassificationConfig, check: Checker) -> None:
    tune = cfg.finetune
    if not tune.zero_shot:
        if cfg.training.skip_train and cfg.checkpoint.load is None and not cfg.training.dry_run:
            check.problems.append(
                "checkpoint.load (absent) must be given: only a fine-tuned model can be evaluated; set --load, or "
                "--zero-shot for a language model"
            )
        check.rule("{class_texts} must not be given without --zero-shot", lambda _: False, "set --zero-shot or drop it")
        return
    check.rule(
        "{zero_shot} must be off with {backbone}", lambda _, kind: kind == "gpt", "drop it: only a GPT reads prompts"
    )
    check.rule("{class_texts} must be as many as {classes}", lambda texts, names: len(texts) == len(names))
    if "{text}" not in tune.prompt_template:
        check.problems.append(
            f"{named('finetune.prompt_template', tune.prompt_template)} must hold {{text}}: write it where the example "
            "belongs in --prompt-template"
        )
    if cfg.checkpoint.load is None and cfg.checkpoint.pretrained_checkpoint is None:
        check.problems.append(
            "checkpoint.pretrained_checkpoint (absent) must be given with --zero-shot: set --pretrained-checkpoint"
        )
