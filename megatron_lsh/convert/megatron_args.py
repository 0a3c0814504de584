"""Megatron-LM's ``args`` <-> our settings. Names are mostly the same, because our flags are Megatron-LM's."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lsh.config import Config
from megatron_lsh.config.settings import named, settings_of, shown
from megatron_lsh.convert.megatron_settings import CUTS, READ, READ_TOO, REQUIRED, WITHOUT_EFFECT
from megatron_lsh.convert.source import fail, refuse_untrainable
from megatron_lsh.convert.torch_file import Inert


def config_of(args: argparse.Namespace, what: str, ignored: Collection[str] = ()) -> tuple[Config, list[str]]:
    """Our settings from Megatron-LM's, and notices about what was passed over.

    Args:
        ignored: names unknown here of which the user knows that they change nothing.

    Raises:
        CheckpointError: a setting that makes a model that is not supported, or that is not known and not off, by name; a
            model that breaks a rule of training.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    problems = [
        f"{_named(name, given[name])} must be {_rule(allowed)}"
        for name, allowed in REQUIRED.items()
        if name in given and given[name] not in allowed
    ]
    unknown = sorted(name for name, value in given.items() if not _known(name) and not _is_off(value))
    problems += [
        f"{_named(name, given[name])} must be off, because nothing here knows it; if you know that it does not change what "
        f"the model computes, give --ignore-settings {name if name.isidentifier() else '...'}"
        for name in unknown
        if name not in ignored
    ]
    encoder = given.get("encoder_num_layers")  # a decoder alone has the number of its layers there as well
    if encoder not in (None, given.get("num_layers")):
        problems.append(f"{_named('encoder_num_layers', encoder)} must be num_layers or absent")
    cfg = Config()
    problems += _read(cfg, _renamed(given))
    problems += _read(Config(), {name: given.get(name) for name in CUTS})  # the files' cuts, not those of a run here
    fail(f"args in {what}", problems, "this model is not supported here")
    if not cfg.model.group_query_attention:
        cfg.model.num_query_groups = cfg.model.num_attention_heads or 1
    refuse_untrainable(cfg, f"args in {what}: this model")
    return cfg, [f"args in {what}: {_named(name, given[name])} is ignored, as you asked" for name in unknown]


def _known(name: str) -> bool:
    return name in READ or name in READ_TOO or name in CUTS or name in REQUIRED or name in WITHOUT_EFFECT


def _is_off(value: Any) -> bool:
    """False, zero, or empty: what a switch, a number or a list is that asks for nothing."""
    return isinstance(value, bool | int | float | str | list | tuple | dict) and not value


def _named(name: str, value: Any) -> str:
    return named(shown(name), "an object" if isinstance(value, Inert) else value)


def _rule(allowed: tuple[Any, ...]) -> str:
    return " or ".join(str(value) for value in allowed if value != "") or "absent"


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are read, under our names; other versions of Megatron-LM have others for some of them."""
    values = {name: given[name] for name in READ if name in given}
    values.setdefault("norm_epsilon", given.get("layernorm_epsilon"))  # since core 0.16
    if given.get("disable_bias_linear"):
        values["add_bias_linear"] = False
    if given.get("use_rotary_position_embeddings"):
        values["position_embedding_type"] = "rope"
    balancing = values.get("moe_router_load_balancing_type")
    if isinstance(balancing, list | tuple):  # one loss beside another, where no transport plan chooses the experts
        values["moe_router_load_balancing_type"] = (
            "sinkhorn" if "sinkhorn" in balancing else next(iter(balancing), None)
        )
    return values


def _read(cfg: Config, values: Mapping[str, Any]) -> list[str]:
    """Sets what is given; returns what is wrong with it."""
    settings, problems = settings_of(Config), []
    for name, value in values.items():
        if value is None:
            continue
        setting, rule = settings[name], None
        try:
            setting.set(cfg, setting.convert(value))
            rule = setting.complaint(setting.get(cfg))
        except ValueError as error:
            rule = str(error)
        if rule is not None:
            problems.append(f"{_named(name, value)} {rule}")
    return problems


def args_of(cfg: Config, tp: int, ep: int, padded_vocab: int, *, te: bool) -> argparse.Namespace:
    """What Megatron-LM's --use-checkpoint-args reads."""
    settings = settings_of(Config)
    values = {name: settings[name].get(cfg) for name in READ}
    if str(values["moe_layer_freq"]).isdigit():
        values["moe_layer_freq"] = int(values["moe_layer_freq"])
    return argparse.Namespace(
        **values,
        layernorm_epsilon=values["norm_epsilon"],
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp,
        padded_vocab_size=padded_vocab,
        transformer_impl="transformer_engine" if te else "local",
        moe_grouped_gemm=te and cfg.moe.num_experts is not None,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
