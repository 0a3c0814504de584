"""Megatron-LM flags that are not settings here, and what happens to them.

``NO_EFFECT``: pure speed switches, and switches for what is always so here. Accepted, and listed once at start-up.
``REJECTED``: everything else, with one line that says what to use instead. A rejected flag that is given the value in
``SAME_AS_HERE`` asks for what happens anyway and counts as without effect.

A flag that an entry script declares as a setting of its own leaves these tables by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SWITCH, VALUE, LIST = "switch", "value", "list"  # how many words follow a flag: none, one, any number

NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        # parallelism and communication
        "--cp-comm-type": LIST,
        "--use-tp-pp-dp-mapping": SWITCH,  # the same order of ranks with one pipeline stage
        "--nccl-communicator-config-path": VALUE,
        "--disable-gloo-process-groups": SWITCH,
        "--overlap-grad-reduce": SWITCH,
        "--overlap-param-gather": SWITCH,
        "--no-overlap-p2p-communication": SWITCH,
        "--ddp-bucket-size": VALUE,
        "--ddp-average-in-collective": SWITCH,
        "--tp-comm-overlap": SWITCH,
        "--overlap-moe-expert-parallel-comm": SWITCH,
        "--ep-overlap-early-attn-memory-release": SWITCH,
        "--delay-wgrad-compute": SWITCH,
        "--defer-embedding-wgrad-compute": SWITCH,
        # fusions and implementations of the same mathematics
        "--transformer-impl": VALUE,
        "--use-mcore-models": SWITCH,
        "--attention-backend": VALUE,
        "--use-flash-attn": SWITCH,
        "--cross-entropy-loss-fusion": SWITCH,
        "--cross-entropy-fusion-impl": VALUE,
        "--no-gradient-accumulation-fusion": SWITCH,
        "--no-masked-softmax-fusion": SWITCH,
        "--no-persist-layer-norm": SWITCH,
        "--no-rope-fusion": SWITCH,
        "--no-bias-swiglu-fusion": SWITCH,
        "--te-rng-tracker": SWITCH,
        "--cuda-graph-impl": VALUE,
        "--manual-gc": SWITCH,
        "--manual-gc-interval": VALUE,
        # mixture of experts
        "--moe-use-legacy-grouped-gemm": SWITCH,
        "--moe-shared-expert-overlap": SWITCH,
        "--moe-router-fusion": SWITCH,
        "--moe-permute-fusion": SWITCH,
        "--moe-router-padding-for-fp8": SWITCH,
        "--moe-router-padding-for-quantization": SWITCH,
        "--moe-pad-expert-input-to-capacity": SWITCH,
        "--moe-deepep-num-sms": VALUE,
        "--moe-hybridep-num-sms": VALUE,
        # always so here
        "--accumulate-allreduce-grads-in-fp32": SWITCH,
        "--attention-softmax-in-fp32": SWITCH,
        "--no-check-for-nan-in-loss-and-grad": SWITCH,  # checking costs nothing extra: the gradient norm is known
        "--no-log-loss-scale-to-tensorboard": SWITCH,
        "--no-use-tokenizer-model-from-checkpoint-args": SWITCH,
        "--use-pytorch-profiler": SWITCH,
        # reading data and checkpoints faster
        "--num-dataset-builder-threads": VALUE,
        "--no-mmap-bin-files": SWITCH,
        "--no-create-attention-mask-in-dataloader": SWITCH,
        "--use-dist-ckpt": SWITCH,
        "--ckpt-fully-parallel-load": SWITCH,
        "--no-ckpt-fully-parallel-save": SWITCH,
        "--ckpt-assume-constant-structure": SWITCH,
        "--use-persistent-ckpt-worker": SWITCH,
    }
)

_PIPELINE = "pipeline parallelism is not implemented; use --expert-model-parallel-size and --tensor-model-parallel-size"
_FSDP = "use --use-distributed-optimizer"
_T5 = "a flag of pretrain_t5_moe.py; other models take --num-layers and --seq-length"
_BERT = "a flag of pretrain_bert_moe.py"
_BERT_T5 = "a flag of pretrain_bert_moe.py and pretrain_t5_moe.py"
_FP16 = "fp16 is not implemented; use --bf16, which needs no loss scale"
_FP8 = "fp8 is not implemented; use --bf16"
_OFFLOAD = "offloading is not implemented; use --recompute-granularity or --use-distributed-optimizer"
_FLEX = "DeepEP is not implemented; use --moe-token-dispatcher-type alltoall (exact) or lsh (compressed)"
_GROUPS = "routing limited to groups of experts is not implemented; drop it"
_FROM_CHECKPOINT = "settings never come from a checkpoint; pass its config.json with --config"
_WANDB = "Weights & Biases is not implemented; use --tensorboard-dir or --metrics-jsonl"
_TIMERS = "timers are not implemented; use --profile, or iteration_time_ms of --metrics-jsonl"
_PROFILER = "not implemented; --profile writes a torch.profiler trace"
_MEMORY = "memory is not logged; --dry-run estimates it, --profile traces it"

REJECTED: Mapping[str, str] = MappingProxyType(
    {
        # parallelism
        "--num-virtual-stages-per-pipeline-rank": _PIPELINE,
        "--pipeline-model-parallel-layout": _PIPELINE,
        "--decoder-first-pipeline-num-layers": _PIPELINE,
        "--decoder-last-pipeline-num-layers": _PIPELINE,
        "--num-distributed-optimizer-instances": "the optimizer is sharded over all data-parallel ranks; drop it",
        "--local-rank": "start the ranks with torchrun, which sets LOCAL_RANK in the environment",
        "--use-megatron-fsdp": _FSDP,
        "--use-torch-fsdp2": _FSDP,
        "--data-parallel-sharding-strategy": _FSDP,
        # architecture
        "--encoder-num-layers": _T5,
        "--decoder-num-layers": _T5,
        "--encoder-seq-length": _T5,
        "--decoder-seq-length": _T5,
        "--use-rope-scaling": "not implemented; use --rotary-base for longer sequences",
        "--apply-layernorm-1p": "not implemented; use --normalization RMSNorm or LayerNorm as it is",
        "--squared-relu": "not implemented; use --swiglu, or GELU (the default)",
        "--multi-latent-attention": "not implemented; use --group-query-attention --num-query-groups N",
        "--mtp-num-layers": "multi-token prediction is not implemented; drop it",
        "--mtp-loss-scaling-factor": "multi-token prediction is not implemented; drop it",
        "--spec": "layer specifications are not implemented; choose the layer with flags such as --normalization",
        # mixture of experts
        "--moe-router-num-groups": _GROUPS,
        "--moe-router-group-topk": _GROUPS,
        "--moe-router-force-biased": "not implemented; use --moe-router-force-load-balancing",
        "--moe-flex-dispatcher-backend": _FLEX,
        "--moe-enable-deepep": _FLEX,
        "--moe-extended-tp": "not implemented; use --expert-model-parallel-size",
        "--moe-apply-probs-on-input": "not implemented; routing weights are applied to the experts' output",
        "--moe-latent-size": "not implemented; --moe-token-dispatcher-type lsh also shrinks what travels",
        "--moe-enable-routing-replay": "not implemented; drop it",
        "--moe-expert-rank-capacity-factor": "not implemented; use --moe-expert-capacity-factor",
        "--moe-paged-stash": _OFFLOAD,
        # training
        "--batch-size": "use --micro-batch-size",
        "--rampup-batch-size": "the batch size is constant; use --global-batch-size",
        "--data-parallel-random-init": "not implemented; initial weights depend only on --seed",
        "--dataloader-type": "samples are always read in one shuffled order (single)",
        "--calculate-per-token-loss": "not implemented; the loss is the mean over micro-batches",
        "--use-precision-aware-optimizer": "optimizer state is always fp32; shard it with --use-distributed-optimizer",
        "--optimizer-cpu-offload": _OFFLOAD,
        "--log-straggler": _TIMERS,
        "--rerun-mode": "steps are never run again; see --max-consecutive-nan-iterations",
        # precision
        "--fp16": _FP16,
        "--loss-scale": _FP16,
        "--initial-loss-scale": _FP16,
        "--min-loss-scale": _FP16,
        "--loss-scale-window": _FP16,
        "--grad-reduce-in-bf16": "gradients are always reduced in fp32; drop it",
        "--fp8-format": _FP8,
        "--fp8-recipe": _FP8,
        "--fp8-param-gather": _FP8,
        "--first-last-layers-bf16": _FP8,
        "--main-grads-dtype": "gradients are always accumulated in fp32; drop it",
        "--exp-avg-dtype": "optimizer state is always fp32; drop it",
        # recomputation and offloading
        "--distribute-saved-activations": "not implemented; use --sequence-parallel",
        "--fine-grained-activation-offloading": _OFFLOAD,
        "--cpu-offloading-num-layers": _OFFLOAD,
        # data and tokenizer
        "--data-args-path": "use --data-path, or data_path in a --config file",
        "--per-split-data-args-path": "use --train-data-path, --valid-data-path and --test-data-path",
        "--merge-file": "not implemented yet: GPT-2 merge files; use --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model FOLDER",
        "--tiktoken-pattern": "not implemented; use --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER",
        "--mask-prob": _BERT_T5,
        "--short-seq-prob": _BERT_T5,
        "--bert-no-binary-head": _BERT,
        # checkpoints
        "--ckpt-convert-format": "there is one format; load with --load and save with --save",
        "--ckpt-convert-save": "there is one format; load with --load and save with --save",
        "--dist-ckpt-strictness": "a checkpoint must fit the model; use --finetune to load weights only",
        "--use-checkpoint-args": _FROM_CHECKPOINT,
        "--use-mp-args-from-checkpoint-args": _FROM_CHECKPOINT,
        "--non-persistent-save-interval": "use --save-interval with --save-retain-interval",
        "--non-persistent-ckpt-type": "use --save-interval with --save-retain-interval",
        "--dist-ckpt-save-pre-mcore-014": "not implemented; drop it",
        # evaluation, logging and profiling
        "--test-mode": "not implemented; use --skip-train to evaluate only",
        "--full-validation": "not implemented; set --eval-iters",
        "--log-timers-to-tensorboard": _TIMERS,
        "--timing-log-level": _TIMERS,
        "--timing-log-option": _TIMERS,
        "--log-num-zeros-in-grad": "not implemented; see --log-params-norm and the gradient norm in the log line",
        "--log-memory-to-tensorboard": _MEMORY,
        "--log-memory-interval": _MEMORY,
        "--log-device-memory-used": _MEMORY,
        "--record-memory-history": _MEMORY,
        "--memory-snapshot-path": _MEMORY,
        "--log-world-size-to-tensorboard": "not implemented; drop it",
        "--logging-level": "not implemented; drop it",
        "--wandb-project": _WANDB,
        "--wandb-exp-name": _WANDB,
        "--wandb-save-dir": _WANDB,
        "--wandb-entity": _WANDB,
        "--log-energy": "not implemented; drop it",
        "--pytorch-profiler-collect-shapes": _PROFILER,
        "--nvtx-ranges": _PROFILER,
        "--log-max-attention-logit": "not implemented; drop it",
    }
)

SAME_AS_HERE: Mapping[str, str] = MappingProxyType(
    {
        "--num-distributed-optimizer-instances": "1",
        "--dataloader-type": "single",
        "--rerun-mode": "disabled",
        "--main-grads-dtype": "fp32",
        "--exp-avg-dtype": "fp32",
        "--cpu-offloading-num-layers": "0",
        "--timing-log-level": "0",
    }
)
