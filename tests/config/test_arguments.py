"""parse_args: every flag and its spelling, what is refused, the YAML file, further flags of an entry script."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, parse_args, to_json, validate
from megatron_lsh.config.flag import flag
from megatron_lsh.config.settings import Setting, settings_of
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import MIXTRAL, SMALL, small

SETTINGS = settings_of(Config)
ALONE = {name: setting for name, setting in SETTINGS.items() if name != "use_checkpoint_args"}  # needs --load


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_args(argv)
    return str(error.value).splitlines()


def words_of(setting: Setting, value: object) -> list[str]:
    """How a user writes a value on the command line."""
    if setting.kind is bool:
        return [setting.flag] if value != setting.default else [setting.flag, "false"]
    return [setting.flag, *map(str, value if isinstance(value, list) else [value])]


def values_of(setting: Setting) -> st.SearchStrategy:
    """Values of the setting's type, without None (which has no spelling on the command line)."""
    text = st.text(st.characters(categories=["L", "N"]), min_size=1)
    kinds = {
        bool: st.booleans(),
        int: st.integers(0, 2**40),
        float: st.floats(0, 1e30),
        str: st.sampled_from(setting.choices) if setting.choices else text,
    }
    return st.lists(kinds[setting.kind], min_size=1, max_size=3) if setting.is_list else kinds[setting.kind]


def test_no_flags_gives_the_defaults() -> None:
    assert parse_args([]) == Config()
    assert parse_args([]).notices == []


@settings(deadline=None, max_examples=30)
@given(st.fixed_dictionaries({}, optional={name: values_of(setting) for name, setting in ALONE.items()}))
def test_every_setting_is_read_from_the_command_line(values: dict[str, Any]) -> None:
    expected = Config()
    words: list[str] = []
    for name, value in values.items():
        SETTINGS[name].set(expected, value)
        words += words_of(SETTINGS[name], value)
    assert parse_args(words) == expected


@pytest.mark.parametrize("name", ALONE)
def test_every_setting_alone(name: str) -> None:
    setting = SETTINGS[name]
    value: Any = {bool: not setting.default, int: 7, float: 0.25, str: setting.choices[-1] if setting.choices else "s"}
    value = [value[setting.kind]] if setting.is_list else value[setting.kind]
    cfg = parse_args(words_of(setting, value))
    assert setting.get(cfg) == value
    setting.set(cfg, setting.default)
    assert cfg == Config()


def test_mixtral_command_line_parses_as_it_stands() -> None:
    cfg = parse_args(MIXTRAL)
    assert cfg.model.num_layers == 32 and cfg.model.ffn_hidden_size == 14336 and not cfg.model.add_bias_linear
    assert cfg.moe.num_experts == 8 and cfg.moe.moe_aux_loss_coeff == 0.01
    assert cfg.parallel.pipeline_model_parallel_size == 4 and cfg.parallel.num_layers_per_virtual_pipeline_stage == 8
    assert cfg.optimizer.lr == 1e-4 and cfg.data.data_path == ["D"] and cfg.checkpoint.load == "L"
    assert cfg.notices == [
        "no effect here: --no-masked-softmax-fusion --moe-permute-fusion --overlap-grad-reduce --overlap-param-gather"
    ]


def test_off_switches_and_megatrons_odd_spellings() -> None:
    cfg = parse_args(["--no-save-optim", "--no-load-rng", "--override-opt_param-scheduler"])
    assert not cfg.checkpoint.save_optim and not cfg.checkpoint.load_rng and cfg.checkpoint.load_optim
    assert cfg.optimizer.override_opt_param_scheduler
    assert parse_args(["--no-save-optim", "false"]).checkpoint.save_optim
    assert parse_args(["--bf16=true"]).precision.bf16 and not parse_args(["--bf16", "--bf16", "false"]).precision.bf16


def test_equals_sign_lists_and_negative_numbers() -> None:
    cfg = parse_args(["--num-layers=3", "--data-path", "0.3", "a", "0.7", "b c", "--lsh-seed", "-5"])
    assert (cfg.model.num_layers, cfg.data.data_path, cfg.lsh.lsh_seed) == (3, ["0.3", "a", "0.7", "b c"], -5)


def test_all_unknown_flags_are_named_with_the_nearest_known_one() -> None:
    lines = problems("--num-layer", "4", "--bf16", "--overlap-grad-reduc", "--lsh-hashes=3", "--num-layer", "5")
    assert lines == [
        "--num-layer is unknown; the nearest flag is --num-layers",
        "--overlap-grad-reduc is unknown; the nearest flag is --overlap-grad-reduce",
        "--lsh-hashes is unknown; the nearest flag is --lsh-num-hashes",
    ]


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("--learning-rate", "--lr"),
        ("--min_learning_rate", "--min-lr"),
        ("--tp-size", "--tensor-model-parallel-size"),
        ("--num-hidden-layers", "--num-layers"),
        ("--warmup-steps", "--lr-warmup-iters"),
        ("--num-experts-per-tok", "--moe-router-topk"),
        ("--seq-len", "--seq-length"),
        ("--output-dir", "--save"),
        ("--target-rate", "--lsh-target-rate"),
        ("--overlap-grad", "--overlap-grad-reduce"),
    ],
)
def test_flags_of_other_programs_are_led_to_ours(foreign: str, ours: str) -> None:
    assert problems(foreign, "1")[0] == f"{foreign} is unknown; the nearest flag is {ours}"


def test_an_unknown_flag_is_unknown_even_if_it_is_turned_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--bf61 is unknown; the nearest flag is --bf16"):
        from_yaml(tmp_path, "bf61: false")


def test_abbreviations_are_unknown_flags() -> None:
    assert "nearest flag is --hidden-size" in problems("--hidden-siz", "4")[0]
    assert "--conf is unknown; the nearest flag is --config" in problems("--conf", "a.yaml")[0]


@settings(deadline=None, max_examples=20)
@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12))
def test_any_unknown_flag_has_a_nearest_one(word: str) -> None:
    assert re.fullmatch(r"--xq\S+ is unknown; the nearest flag is --\S+", problems("--xq" + word)[0])


def test_everything_wrong_is_reported_at_once() -> None:
    lines = problems("--lr", "fast", "--squared-relu", "--bf16", "perhaps", "--num-layers", "1.5", "--nope")
    assert lines == [
        "optimizer.lr (fast) must be a finite number: change --lr",
        "precision.bf16 (perhaps) must be true or false: change --bf16",
        "model.num_layers (1.5) must be an integer: change --num-layers",
        lines[3],
        "--squared-relu is Megatron-LM's and not supported here: squared ReLU is not implemented; use "
        "--swiglu, or GELU (the default)",
    ]
    assert lines[3].startswith("--nope is unknown")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999", ""])
def test_numbers_must_be_finite(number: str) -> None:
    shown = number or "''"
    assert problems(f"--lr={number}") == [f"optimizer.lr ({shown}) must be a finite number: change --lr"]


def test_minus_zero_is_zero() -> None:
    """Random generators refuse a standard deviation of -0 as a negative one."""
    assert math.copysign(1.0, parse_args(["--weight-decay=-0.0"]).optimizer.weight_decay) == 1.0


def test_stray_words_and_missing_values() -> None:
    assert problems("--num-layers", "4", "5") == ["5 must follow a flag that takes it: drop it, or see --help"]
    assert problems("--num-layers") == [
        "--num-layers must be followed by one value: give it (one that begins with - as --num-layers=-value)"
    ]
    assert problems("--data-path")[0].startswith("--data-path must be followed by at least one value: give it")


def test_help_groups_flags_and_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "lsh: The LSH token dispatcher" in text
    assert "--lsh-num-hashes INT Number q of cross-polytope hashes" in text and "(default: 2)" in text
    assert "--disable-bias-linear [false] Turn off biases in linear layers" in text
    assert "--squared-relu" not in text


# --- further parts -----------------------------------------------------------------------------------------------------


@dataclass
class MaskConfig:
    """Masked language modelling."""

    mask_prob: float = flag(0.15, "Share of tokens that are masked", above=0, below=1)


@dataclass
class MaskedConfig(Config):
    mask: MaskConfig = field(default_factory=MaskConfig)


def test_an_entry_script_adds_flags_of_its_own() -> None:
    cfg = parse_args(["--mask-prob", "0.2", *SMALL], MaskedConfig)
    assert isinstance(cfg, MaskedConfig) and cfg.mask.mask_prob == 0.2
    assert validate(cfg, 1).mask.mask_prob == 0.2
    assert (
        "--mask-prob is Megatron-LM's and not supported here: a flag of pretrain_bert_moe.py"
        in problems("--mask-prob", "0.2")[0]
    )
    cfg.mask.mask_prob = 1.0
    with pytest.raises(ConfigError, match=r"mask.mask_prob \(1.0\) must be above 0 and below 1: change --mask-prob"):
        validate(cfg, 1)


def test_one_name_in_two_parts_is_a_mistake() -> None:
    @dataclass
    class Twice(Config):
        mask: MaskConfig = field(default_factory=MaskConfig)
        again: MaskConfig = field(default_factory=MaskConfig)

    with pytest.raises((ValueError, NameError)):
        settings_of(Twice)


# --- --config ----------------------------------------------------------------------------------------------------------


def from_yaml(tmp_path: Path, text: str, *argv: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse_args(["--config", str(path), *argv])


def test_yaml_flat_and_nested_and_the_command_line_wins(tmp_path: Path) -> None:
    text = """
    num-layers: 4
    disable_bias_linear: true
    lr: 1e-3                      # a string for YAML 1.1
    optimizer: sgd                # also the name of a section
    moe: {num_experts: 8, moe_layer_freq: [0, 1, 0, 1], moe_z_loss_coeff: null}
    data:
      data_path: [0.3, a, 0.7, b]
      split: [969, 30, 1]
    logging:
      tensorboard_dir: runs/1
    """
    cfg = from_yaml(tmp_path, text, "--num-layers", "2", "--disable-bias-linear", "false")
    assert cfg.model.num_layers == 2 and cfg.model.add_bias_linear
    assert cfg.optimizer.lr == 1e-3 and cfg.optimizer.optimizer == "sgd"
    assert cfg.moe.num_experts == 8 and cfg.moe.moe_layer_freq == "[0, 1, 0, 1]" and cfg.moe.moe_z_loss_coeff is None
    assert cfg.data.data_path == ["0.3", "a", "0.7", "b"] and cfg.data.split == "969,30,1"
    assert cfg.logging.tensorboard_dir == "runs/1"
    assert not from_yaml(tmp_path, "add_bias_linear: false").model.add_bias_linear
    assert from_yaml(tmp_path, "") == Config()


def test_yaml_knows_megatrons_flags_too(tmp_path: Path) -> None:
    cfg = from_yaml(
        tmp_path, "moe-permute-fusion: true\nsquared_relu: false\nmtp_num_layers: null\ndataloader_type: single"
    )
    assert cfg.notices == ["no effect here: --moe-permute-fusion --dataloader-type"]
    with pytest.raises(ConfigError, match="--squared-relu is Megatron-LM's and not supported here"):
        from_yaml(tmp_path, "squared_relu: true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layer: 4", "--num-layer is unknown; the nearest flag is --num-layers"),
        ("modell: {num_layers: 4}", "section modell must be one of model, moe, lsh"),
        ("num_layers: 4\nmodel: {num-layers: 4}", "num-layers is given twice"),
        ("num_layers: 4\nnum_layers: 5", "num_layers is given twice"),
        ("num_layers: four", r"model.num_layers \(four\) must be an integer"),
        ("num_layers: 4.0", r"model.num_layers \(4.0\) must be an integer"),
        ("num_layers: true", r"model.num_layers \(True\) must be an integer"),
        ("num_layers: [4]", r"model.num_layers \(\[4\]\) must be an integer"),
        ("bf16: 1", r"precision.bf16 \(1\) must be true or false"),
        ("lr: .nan", r"optimizer.lr \(nan\) must be a finite number"),
        ("split: no", r"data.split \(False\) must be a string"),
        ("seed: null", r"training.seed \(absent\) must have a value"),
        ("- 1", "must hold a mapping from settings to values"),
        ("a: [", "must be a YAML file"),
    ],
)
def test_yaml_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_yaml(tmp_path, text)


def test_unreadable_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config \(.*missing.yaml\) must be a readable file of text: No such file"):
        parse_args(["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(ConfigError, match="must be a readable file of text: Is a directory"):
        parse_args(["--config", str(tmp_path)])


def test_a_saved_config_can_be_run_again_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(small(world_size=2)))
    assert validate(parse_args(["--config", str(path)]), 2) == small(world_size=2)
    wider = validate(parse_args(["--config", str(path), "--hidden-size", "128"]), 4)
    assert wider == small("--hidden-size 128", world_size=4)
    assert wider.model.ffn_hidden_size == 512 and wider.training.global_batch_size == 8
    assert json.loads(path.read_text())["config"]["model"]["ffn_hidden_size"] == 256


def test_the_shape_of_the_model_comes_from_the_checkpoint(tmp_path: Path) -> None:
    saved = small("--moe-router-topk 4 --swiglu --tokenizer-type ByteTokenizer --lr 7")
    folder = tmp_path / "iter_0000020"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(saved))
    words = ["--use-checkpoint-args", "--load", str(tmp_path), "--hidden-size", "128", "--moe-router-topk", "2"]
    assert parse_args(words).notices == [
        f"--use-checkpoint-args: no checkpoint in {tmp_path}, so the command line stands"
    ]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    cfg = parse_args(words)
    assert cfg.notices == [
        f"--use-checkpoint-args: the model's shape and its tokenizer are those of {folder}/config.json"
    ]
    assert (cfg.model.num_layers, cfg.moe.num_experts, cfg.data.tokenizer_type) == (4, 8, "ByteTokenizer")
    assert cfg.model.hidden_size == 128  # as in Megatron-LM the command line wins with sizes,
    assert cfg.model.swiglu and cfg.moe.moe_router_topk == 4  # and the checkpoint with the rest
    assert cfg.optimizer.lr is None and cfg.model.ffn_hidden_size is None  # not of the shape; derived
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert "no checkpoint" in parse_args(words).notices[0]
    with pytest.raises(ConfigError, match="must be off without a checkpoint: set --load"):
        parse_args(["--use-checkpoint-args"])
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be the configuration of a checkpoint"):
        parse_args(words)
