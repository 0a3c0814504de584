"""Megatron-LM flags that are not settings here, and what happens to them.

Every flag of Megatron-LM that we know is in exactly one of three places:

* It is implemented: a field of a dataclass in this folder, or another name of one (``TAKEN_AS``).
* ``NO_EFFECT``: it changes no number that is computed, but speed, memory or what is looked at, or asks for what is always so
  here. Accepted, and named together once at start-up.
* ``REJECTED``: it would change a number, or is a feature that someone relies on. Each says its feature and what to use
  instead. A rejected flag that is given the value in ``SAME_AS_HERE`` asks for what happens anyway: no effect.

A flag that an entry script declares as a setting of its own is dropped from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

SWITCH, VALUE, LIST = "switch", "value", "list"  # how many words follow a flag: none, one, any number


@dataclass(frozen=True)
class NoEffect:
    """A flag that changes no number here: how many words follow it, and why it changes none."""

    words: str
    why: str


def _because(why: str, switches: str = "", values: str = "", lists: str = "") -> dict[str, NoEffect]:
    """Flags that have no effect for one reason, by the number of words that follow them."""
    by_words = {SWITCH: switches, VALUE: values, LIST: lists}
    return {flag: NoEffect(words, why) for words, flags in by_words.items() for flag in flags.split()}


@dataclass(frozen=True)
class Taken:
    """A switch that is another name of a setting with a value."""

    setting: str
    value: Any
    why: str  # in what it differs from Megatron-LM's; empty if in nothing


_FSDP = (
    "taken as --use-distributed-optimizer: gradients and optimizer state are sharded; parameters too, but they are gathered "
    "for a whole iteration"
)

TAKEN_AS: Mapping[str, Taken] = MappingProxyType(
    {
        "--use-rotary-position-embeddings": Taken("position_embedding_type", "rope", ""),
        "--use-torch-fsdp2": Taken("use_distributed_optimizer", True, _FSDP),
        "--use-megatron-fsdp": Taken("use_distributed_optimizer", True, _FSDP),
    }
)

NO_EFFECT: Mapping[str, NoEffect] = MappingProxyType(
    {
        **_because(
            "when and how bytes travel, not which",
            switches="--moe-enable-deepep --overlap-grad-reduce --overlap-param-gather "
            "--overlap-param-gather-with-optimizer-step --no-overlap-p2p-communication "
            "--overlap-p2p-communication-warmup-flush --tp-comm-overlap --overlap-moe-expert-parallel-comm "
            "--ep-overlap-early-attn-memory-release --delay-wgrad-compute --defer-embedding-wgrad-compute "
            "--disable-gloo-process-groups --ddp-average-in-collective",
            values="--nccl-communicator-config-path --ddp-bucket-size --tp-comm-overlap-cfg --wgrad-deferral-limit "
            "--moe-flex-dispatcher-backend --moe-deepep-num-sms --moe-hybridep-num-sms "
            "--microbatch-group-size-per-virtual-pipeline-stage",
            lists="--cp-comm-type --hierarchical-context-parallel-sizes",
        ),
        **_because(
            "which rank computes or holds a part, not what is computed",
            switches="--use-tp-pp-dp-mapping --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split --no-use-layer-wise-param-layout",
            values="--num-distributed-optimizer-instances --data-parallel-sharding-strategy --outer-dp-sharding-strategy",
        ),
        **_because(
            "another implementation of the same formula",
            switches="--use-mcore-models --use-flash-attn --cross-entropy-loss-fusion --no-gradient-accumulation-fusion "
            "--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion --no-bias-swiglu-fusion "
            "--no-bias-gelu-fusion --no-bias-dropout-fusion --moe-use-legacy-grouped-gemm --moe-router-fusion "
            "--moe-permute-fusion --use-transformer-engine-op-fuser",
            values="--transformer-impl --attention-backend --cross-entropy-fusion-impl --cuda-graph-impl "
            "--cuda-graph-warmup-steps",
            lists="--cuda-graph-modules",
        ),
        **_because(
            "scores are divided by a number before the softmax and multiplied by it inside: the same function",
            switches="--apply-query-key-layer-scaling",
        ),
        **_because(
            "another stream of random numbers, which differ between programs anyway", switches="--te-rng-tracker"
        ),
        **_because(
            "padding that no token's result depends on",
            switches="--moe-router-padding-for-fp8 --moe-router-padding-for-quantization "
            "--moe-pad-expert-input-to-capacity --moe-pad-experts-for-cuda-graph-inference",
        ),
        **_because(
            "when memory is given back, not what is in it",
            switches="--manual-gc",
            values="--manual-gc-interval --empty-unused-memory-level",
        ),
        **_because(
            "always so here",
            switches="--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 "
            "--no-log-loss-scale-to-tensorboard --no-use-tokenizer-model-from-checkpoint-args --use-pytorch-profiler",
        ),
        **_because(
            "the loss and the gradient norm are always checked: they are known anyway",
            switches="--no-check-for-nan-in-loss-and-grad",
        ),
        **_because(
            "checks results, and changes none of them: see --max-consecutive-nan-iterations",
            values="--rerun-mode --check-weight-hash-across-dp-replicas-interval",
            switches="--test-mode",
        ),
        **_because(
            "how fast data are read",
            values="--num-dataset-builder-threads",
            switches="--no-mmap-bin-files --no-create-attention-mask-in-dataloader",
        ),
        **_because(
            "how fast a checkpoint is written or read, and what is said of it: it fits any layout, and must fit the model",
            values="--dist-ckpt-strictness --async-strategy",
            switches="--use-dist-ckpt --ckpt-fully-parallel-load --ckpt-fully-parallel-save "
            "--no-ckpt-fully-parallel-save --ckpt-assume-constant-structure --use-persistent-ckpt-worker "
            "--async-ckpt-use-cpu-shm --dist-ckpt-optim-fully-reshardable --verify-integrity",
        ),
        **_because(
            "a figure that is not logged here: see --tensorboard-dir, --metrics-jsonl and --profile for those that are",
            switches="--log-timers-to-tensorboard --log-num-zeros-in-grad --log-memory-to-tensorboard "
            "--log-device-memory-used --log-world-size-to-tensorboard --log-energy",
            values="--timing-log-level --timing-log-option --straggler-minmax-count --log-memory-interval "
            "--logging-level",
        ),
        **_because("always logged: slowest_rank in --metrics-jsonl", switches="--log-straggler"),
        **_because("only unlocks other flags, which are judged one by one", switches="--enable-experimental"),
    }
)


def _rejected(advice: str, flags: str) -> dict[str, str]:
    return dict.fromkeys(flags.split(), advice)


_HF_TOKENIZER = "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER"
_T5 = "a flag of pretrain_t5_moe.py; other models take --num-layers and --seq-length"

REJECTED: Mapping[str, str] = MappingProxyType(
    {
        # parallelism
        **_rejected(
            "a pipeline by a pattern is not implemented; use --decoder-first-pipeline-num-layers, "
            "--decoder-last-pipeline-num-layers and --num-virtual-stages-per-pipeline-rank",
            "--pipeline-model-parallel-layout",
        ),
        **_rejected("start the ranks with torchrun, which sets LOCAL_RANK in the environment", "--local-rank"),
        **_rejected(
            "parameters and gradients are always summed in fp32; drop it",
            "--megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype",
        ),
        # architecture
        **_rejected(_T5, "--encoder-num-layers --decoder-num-layers --encoder-seq-length --decoder-seq-length"),
        **_rejected(
            "scaling of rotary frequencies is not implemented; use --rotary-base for longer sequences",
            "--use-rope-scaling",
        ),
        **_rejected(
            "norms stored as 1 + weight (layernorm-1p) are not implemented; use --normalization as it is",
            "--apply-layernorm-1p",
        ),
        **_rejected("squared ReLU is not implemented; use --swiglu, or GELU (the default)", "--squared-relu"),
        **_rejected(
            "multi-latent attention (MLA) is not implemented; use --group-query-attention --num-query-groups N",
            "--multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
            "--mscale --mscale-all-dim --rotary-scaling-factor",
        ),
        **_rejected(
            "linear and sparse attention (gated delta net, DSA) are not implemented; drop it",
            "--experimental-attention-variant --linear-attention-freq --linear-conv-kernel-dim --linear-key-head-dim "
            "--linear-num-key-heads --linear-num-value-heads --linear-value-head-dim --dsa-indexer-head-dim "
            "--dsa-indexer-loss-coeff --dsa-indexer-n-heads --dsa-indexer-topk",
        ),
        **_rejected("gates on the attention's output are not implemented; drop it", "--attention-output-gate"),
        **_rejected(
            "multi-token prediction (MTP) is not implemented; drop it", "--mtp-num-layers --mtp-loss-scaling-factor"
        ),
        **_rejected(
            "layer specifications are not implemented; choose the layer with flags such as --normalization", "--spec"
        ),
        **_rejected(
            "maximal update parametrization (muP) is not implemented; set --init-method-std and --lr",
            "--use-mup --mup-base-hidden-size",
        ),
        # mixture of experts
        **_rejected(
            "biased routing is not implemented; use --moe-router-force-load-balancing", "--moe-router-force-biased"
        ),
        **_rejected("cutting experts is not implemented; use --expert-model-parallel-size", "--moe-extended-tp"),
        **_rejected(
            "weights on the experts' input are not implemented; they are applied to the output",
            "--moe-apply-probs-on-input",
        ),
        **_rejected("routing replay is not implemented; drop it", "--moe-enable-routing-replay"),
        **_rejected(
            "a capacity per rank is not implemented; use --moe-expert-capacity-factor",
            "--moe-expert-rank-capacity-factor",
        ),
        # training
        **_rejected("use --micro-batch-size", "--batch-size"),
        **_rejected(
            "a batch size that grows is not implemented; use --global-batch-size",
            "--rampup-batch-size --step-batch-size-schedule",
        ),
        **_rejected(
            "another batch size for evaluation is not implemented; set --eval-iters",
            "--eval-global-batch-size --eval-micro-batch-size",
        ),
        **_rejected(
            "weight decay on norms is not implemented; --weight-decay leaves them out", "--apply-wd-to-qk-layernorm"
        ),
        **_rejected(
            "initial weights that differ between data-parallel ranks are not implemented; they depend only on --seed",
            "--data-parallel-random-init",
        ),
        **_rejected("samples are always read in one shuffled order (single)", "--dataloader-type"),
        **_rejected(
            "optimizer state in less than fp32 is not implemented; shard it with --use-distributed-optimizer",
            "--use-precision-aware-optimizer --exp-avg-dtype",
        ),
        **_rejected(
            "offloading is not implemented; use --recompute-granularity or --use-distributed-optimizer",
            "--optimizer-cpu-offload --cpu-offloading-num-layers --fine-grained-activation-offloading --offload-modules "
            "--moe-paged-stash",
        ),
        **_rejected("injection of errors is not implemented; drop it", "--error-injection-rate --error-injection-type"),
        # precision
        **_rejected(
            "gradients are always accumulated and reduced in fp32; drop it", "--grad-reduce-in-bf16 --main-grads-dtype"
        ),
        **_rejected(
            "fp8 is not implemented; use --bf16",
            "--fp8-format --fp8-recipe --fp8-param-gather --first-last-layers-bf16",
        ),
        # recomputation
        **_rejected(
            "cutting saved activations is not implemented; use --sequence-parallel", "--distribute-saved-activations"
        ),
        # data and tokenizer
        **_rejected("use --data-path, or data_path in a --config file", "--data-args-path"),
        **_rejected("use --train-data-path, --valid-data-path and --test-data-path", "--per-split-data-args-path"),
        **_rejected(f"tiktoken is not implemented; {_HF_TOKENIZER}", "--tiktoken-pattern"),
        **_rejected("filling in the middle (FIM) is not implemented; drop it", "--fim-data --fim-rate --fim-spm-rate"),
        **_rejected("a flag of pretrain_bert_moe.py and pretrain_t5_moe.py", "--mask-prob --short-seq-prob"),
        **_rejected("a flag of pretrain_bert_moe.py", "--bert-no-binary-head"),
        # checkpoints
        **_rejected(
            "there is one format; load with --load and save with --save", "--ckpt-convert-format --ckpt-convert-save"
        ),
        **_rejected(
            "a layout from a checkpoint is not implemented; a checkpoint fits any: give --tensor-model-parallel-size",
            "--use-mp-args-from-checkpoint-args",
        ),
        **_rejected(
            "non-persistent checkpoints are not implemented; use --save-interval with --save-retain-interval",
            "--non-persistent-save-interval --non-persistent-ckpt-type",
        ),
        **_rejected("older formats are not written; drop it", "--dist-ckpt-save-pre-mcore-014"),
        # evaluation and profiling
        **_rejected("validation over all of the data is not implemented; set --eval-iters", "--full-validation"),
        **_rejected(
            "NVTX ranges and shapes are not implemented; --profile writes a torch.profiler trace",
            "--pytorch-profiler-collect-shapes --nvtx-ranges",
        ),
        **_rejected("attention logits are not logged; drop it", "--log-max-attention-logit"),
        # other programs than pretraining
        **_rejected(
            "reinforcement learning (RL) is not implemented; drop it",
            "--perform-rl-step --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-entropy-term-weight --grpo-group-size "
            "--grpo-iterations --grpo-kl-beta --grpo-prompts-per-step --langrl-env-config --refit-method "
            "--rl-consumption-granularity --rl-generation-lag --rl-inference-expert-model-parallel-size "
            "--rl-inference-expert-tensor-model-parallel-size --rl-inference-model-unified-memory-level "
            "--rl-inference-pipeline-model-parallel-size --rl-inference-tensor-model-parallel-size "
            "--rl-offload-inference-model-weights-when-idle --rl-offload-optimizer-during-inference --rl-partial-rollouts "
            "--rl-sequence-packing-algo --rl-submission-granularity --rl-training-cuda-graphs --rl-use-sequence-packing",
        ),
        **_rejected(
            "an inference server is not implemented; tools/generate.py writes texts",
            "--inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-cuda-graph-sizing-distribution "
            "--inference-dynamic-batching-num-cuda-graphs --inference-dynamic-batching-unified-memory-level "
            "--inference-logging-step-interval --inference-max-seq-length --max-tokens-to-oom",
        ),
        **_rejected(
            "distillation and ModelOpt are not implemented; drop it",
            "--export-kd-cfg --export-kd-teacher-load --export-te-mcore-model",
        ),
    }
)

SAME_AS_HERE: Mapping[str, str] = MappingProxyType(
    {
        "--dataloader-type": "single",
        "--megatron-fsdp-main-params-dtype": "fp32",
        "--megatron-fsdp-main-grads-dtype": "fp32",
        "--megatron-fsdp-grad-comm-dtype": "fp32",
        "--main-grads-dtype": "fp32",
        "--exp-avg-dtype": "fp32",
        "--cpu-offloading-num-layers": "0",
        "--spec": "local",
    }
)
