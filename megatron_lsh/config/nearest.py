"""The known flag that a user most likely meant by one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

# Words that other programs (transformers, DeepSpeed, torchtitan, nanoGPT) use for those of Megatron-LM's flags.
_MEANING: Mapping[str, str] = MappingProxyType(
    {
        "lr": "learning rate",
        "tp": "tensor model parallel size",
        "pp": "pipeline model parallel size",
        "cp": "context parallel size",
        "ep": "expert model parallel size",
        "etp": "expert tensor parallel size",
        "mbs": "micro batch size",
        "gbs": "global batch size",
        "n": "num",
        "iterations": "iters",
        "steps": "iters",
        "layer": "layers",
        "head": "heads",
        "expert": "experts",
        "dim": "size",
        "sequence": "seq",
        "len": "length",
        "gradient": "grad",
        "clipping": "clip",
        "k": "topk",
        "dir": "",
        "every": "interval",
    }
)

# Their flags of which no word says which of ours is meant.
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "--activation": "--swiglu",
        "--batch": "--micro-batch-size",
        "--beta1": "--adam-beta1",
        "--beta2": "--adam-beta2",
        "--betas": "--adam-beta1",
        "--context-length": "--seq-length",
        "--d-model": "--hidden-size",
        "--data": "--data-path",
        "--dataset": "--data-path",
        "--dropout": "--hidden-dropout",
        "--dtype": "--bf16",
        "--embed-dim": "--hidden-size",
        "--eval-steps": "--eval-interval",
        "--ffn-dim": "--ffn-hidden-size",
        "--gradient-accumulation-steps": "--global-batch-size",
        "--head-dim": "--kv-channels",
        "--intermediate-size": "--ffn-hidden-size",
        "--logging-steps": "--log-interval",
        "--lr-scheduler": "--lr-decay-style",
        "--max-grad-norm": "--clip-grad",
        "--max-steps": "--train-iters",
        "--mixed-precision": "--bf16",
        "--n-embd": "--hidden-size",
        "--num-experts-per-tok": "--moe-router-topk",
        "--num-key-value-heads": "--num-query-groups",
        "--num-kv-heads": "--num-query-groups",
        "--output-dir": "--save",
        "--per-device-train-batch-size": "--micro-batch-size",
        "--precision": "--bf16",
        "--resume": "--load",
        "--resume-from-checkpoint": "--load",
        "--rms-norm-eps": "--norm-epsilon",
        "--rope-theta": "--rotary-base",
        "--save-steps": "--save-interval",
        "--steps": "--train-iters",
        "--top-k": "--moe-router-topk",
        "--topk": "--moe-router-topk",
        "--warmup": "--lr-warmup-iters",
        "--warmup-ratio": "--lr-warmup-fraction",
    }
)


def nearest_flag(flag: str, ours: Iterable[str], others: Iterable[str] = ()) -> str:
    """The flag that is most like ``flag``, letter by letter or, better, in its words.

    Abbreviations count as what they stand for, so that --learning-rate is --lr. One of ``ours`` (not empty) is the answer
    unless one of ``others``, which are known and do nothing, is clearly nearer. Flags of LSH answer only to one that names
    LSH or is nearly their spelling.
    """
    ours, flag = list(ours), flag[:80]
    elsewhere = _ELSEWHERE.get(flag.replace("_", "-").lower())
    if elsewhere in ours:
        return elsewhere
    likeness = {other: _likeness(flag, other) for other in ours}
    likeness |= {other: _likeness(flag, other) - 0.15 for other in others}
    return max(likeness, key=likeness.__getitem__)


def _likeness(flag: str, other: str) -> float:
    letters = difflib.SequenceMatcher(None, flag, other).ratio()
    mine, others = _words(flag), _words(other)
    words = difflib.SequenceMatcher(None, " ".join(mine), " ".join(others)).ratio()
    if mine and set(mine) <= set(others):
        words += 0.2
    foreign = 0.3 if "lsh" in others and "lsh" not in mine and letters < 0.9 else 0.0
    return max(letters, words) - foreign


def _words(flag: str) -> list[str]:
    return " ".join(_MEANING.get(word, word) for word in flag.lstrip("-").lower().replace("_", "-").split("-")).split()
