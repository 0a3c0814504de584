"""The keys of a Hugging Face config.json: read with checks, and none passed over.

Every key that a reader asks for is known. Of the others, those of `WITHOUT_EFFECT` change no number of the model. Whatever
is left may be another architecture (a new kind of scaling, a window, a norm), so it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lsh.errors import CheckpointError

# Of any family, in any version of transformers: what the model computes for given tokens does not depend on them.
WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _flash_attn_2_enabled _name_or_path _output_attentions architectures attn_implementation auto_map base_model_ep_plan
    base_model_pp_plan base_model_tp_plan custom_pipelines dtype finetuning_task id2label is_llama_config label2id
    max_model_len max_sequence_length model_max_length model_type name_or_path num_labels output_attentions
    output_hidden_states output_router_logits output_scores prefix pretraining_tp problem_type return_dict
    return_dict_in_generate task_specific_params tensor_parallel_plan tokenizer_class torch_dtype torchscript
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict

    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    image_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    suppress_tokens temperature top_k top_p typical_p

    aux_loss_alpha ep_size hidden_dropout initializer_range moe_router_aux_loss_coeff resid_pdrop embd_pdrop residual_dropout
    embedding_dropout router_aux_loss_coef router_jitter_noise router_z_loss_coef seq_aux z_loss_coeff
    """.split()  # noqa: SIM905 - readable
)
_LARGEST = 2**31 - 1


class Keys:
    """config.json with errors that name file, key, value, rule and remedy.

    Args:
        where: path of the file, for messages.
        defaults: what transformers takes for keys of this family that are absent. (A key that is null is off.)
    """

    def __init__(self, document: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.document, self.where = document, where
        self._defaults = defaults or {}
        self._known: set[str] = set()

    def value(self, name: str) -> Any:
        """As it stands, or transformers' default, or None."""
        self._known.add(name)
        return self.document[name] if name in self.document else self._defaults.get(name)

    def number(self, name: str, *, at_least: float = 0.0) -> float | None:
        """A finite number above zero (or `at_least`), or None if it is neither there nor has a default."""
        value = self.value(name)
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
        if not number or value < at_least or (at_least == 0.0 and value == 0):
            raise self.error(name, f"a number of at least {at_least:g}" if at_least else "a positive number", _AGAIN)
        return float(value)

    def share(self, name: str) -> float:
        """A number from 0 to below 1; 0 if absent."""
        value = self.value(name)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.error(name, "at least 0 and below 1", _AGAIN)
        return float(value)

    def whole(self, *names: str, at_least: int = 1, at_most: int = _LARGEST) -> int:
        """A whole number, which one of these keys (names of one thing) must give; if several do, the same.

        Raises CheckpointError.
        """
        given = {name: value for name in names if (value := self.value(name)) is not None}
        if not given:
            raise self.error(names[0], "given", "use the config.json that belongs to these weights")
        for name, value in given.items():
            if isinstance(value, float) and value.is_integer():
                value = given[name] = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
                raise self.error(name, f"a whole number from {at_least} to {at_most}", _AGAIN)
        first, *others = given
        for other in others:
            if given[other] != given[first]:
                raise self.error(other, f"equal to {first} ({given[first]}), its other name", "remove one of them")
        return int(given[first])

    def switch(self, name: str) -> bool:
        """True or false; false if absent and without a default."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false", _AGAIN)
        return bool(value)

    def must_be(self, name: str, *allowed: Any) -> None:
        """One of these values (None: absent, or null)."""
        value = self.value(name)
        if not any(_same(value, one) for one in allowed):
            rule = " or ".join(str(one) for one in allowed if one is not None) or "absent"
            raise self.error(name, rule, "this model computes something that is not implemented here")

    def refuse_unknown(self, ignored: Collection[str] = ()) -> list[str]:
        """Raise CheckpointError for keys that nobody asked for and that could change what the model computes.

        Args:
            ignored: keys that the user vouches for; a notice about each that is there is returned.
        """
        unknown = [
            name
            for name, value in self.document.items()
            if value is not None and name not in self._known and name not in WITHOUT_EFFECT
        ]
        for name in unknown:
            if name not in ignored:
                raise self.error(
                    name,
                    "absent, because nothing here knows the key",
                    "it may change what the model computes; if you know that it does not, give --ignore-settings "
                    f"{name if name.isprintable() else '...'}",
                )
        return [f"{self.where}: {name} ({self.document[name]!r:.60}) is ignored, as you asked" for name in unknown]

    def error(self, name: str, rule: str, remedy: str) -> CheckpointError:
        value = self.value(name)
        text = "absent" if value is None else f"{value!s:.80}"
        if name not in self.document and value is not None:
            text = f"absent, which to transformers means {value}"
        if isinstance(value, str) and "number" in rule:
            rule += ", not a text"
        return CheckpointError(f"{self.where}: {name} ({text}) must be {rule}: {remedy}")


_AGAIN = "download the file again"


def _same(value: Any, one: Any) -> bool:
    """Equal; 1 and 1.0 are one number, and True is none."""
    if type(value) is type(one):
        return bool(value == one)
    return {type(value), type(one)} == {int, float} and math.isclose(value, one, rel_tol=1e-9)
