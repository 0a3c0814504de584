"""Shape of the transformer (the dense parts; experts are in ``moe.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lsh.config.flag import flag

MOST_LAYERS = 100_000  # keeps a slip of the finger from making a list that eats the memory


@dataclass
class ModelConfig:
    """Architecture of the dense transformer. Names, defaults and meaning are Megatron-LM's."""

    num_layers: int | None = flag(None, "Number of transformer layers", at_least=1, at_most=MOST_LAYERS)
    hidden_size: int | None = flag(None, "Width D of the residual stream", at_least=1)
    ffn_hidden_size: int | None = flag(
        None,
        "Width F of the feed-forward layer (default: 4 D, or 8/3 D rounded down to a multiple of 64 with --swiglu)",
        at_least=1,
    )
    num_attention_heads: int | None = flag(None, "Number of attention heads", at_least=1)
    kv_channels: int | None = flag(None, "Width of one attention head (default: D / heads)", at_least=1)
    group_query_attention: bool = flag(False, "Share keys and values among groups of heads (GQA)")
    num_query_groups: int = flag(1, "Number of key/value heads when --group-query-attention is given", at_least=1)
    seq_length: int | None = flag(None, "Tokens per sequence", at_least=1)
    max_position_embeddings: int | None = flag(
        None, "Longest sequence the position embedding supports (default: --seq-length)", at_least=1
    )
    position_embedding_type: str = flag(
        "learned_absolute",
        "Kind of position embedding; relative is a learned bias of attention scores by distance, for T5",
        choices=("learned_absolute", "rope", "relative", "none"),
    )
    rotary_base: int = flag(10000, "Base of the rotary frequencies", at_least=1)
    rotary_percent: float = flag(1.0, "Share of each head's channels that is rotated", above=0, at_most=1)
    rotary_interleaved: bool = flag(False, "Rotate neighbouring channels together instead of those half a head apart")
    make_vocab_size_divisible_by: int = flag(
        128, "Pad the vocabulary to a multiple of this times the TP size", at_least=1
    )
    vocab_size: int | None = flag(None, "Size of the vocabulary before padding (default: the tokenizer's)", at_least=1)
    normalization: str = flag("LayerNorm", "Kind of normalization", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = flag(1e-5, "Epsilon of the normalization layers", above=0)
    apply_residual_connection_post_layernorm: bool = flag(
        False,
        "Take the residual connections from behind the norms instead of before them: the order of the original BERT, whose "
        "embedding norm is then the first layer's",
    )
    swiglu: bool = flag(False, "Use SwiGLU instead of GELU in feed-forward layers and experts")
    openai_gelu: bool = flag(False, "Use the tanh approximation of GELU")
    add_bias_linear: bool = flag(True, "Biases in linear layers", off="--disable-bias-linear")
    add_bias_fc2: bool = flag(
        True,
        "Bias of the second linear layer of feed-forward layers and experts (ours)",
        off="--disable-bias-fc2",
    )
    add_qkv_bias: bool = flag(False, "Bias in the QKV projection even with --disable-bias-linear")
    qk_layernorm: bool = flag(False, "Normalize queries and keys")
    qk_layernorm_width: str = flag(
        "head",
        "What --qk-layernorm normalizes over: each head by itself (Megatron, Qwen3), or all heads together (OLMoE; RMSNorm "
        "only)",
        choices=("head", "full"),
    )
    untie_embeddings_and_output_weights: bool = flag(False, "Separate weights for input and output embeddings")
    init_method_std: float = flag(0.02, "Standard deviation of the initial weights", above=0)
    scaled_init: bool = flag(
        True,
        "Initial weights that write to the residual stream divided by sqrt(2 x layers) (ours; Megatron always divides)",
        off="--no-scaled-init",
    )
    attention_dropout: float = flag(0.1, "Dropout on attention probabilities", at_least=0, below=1)
    hidden_dropout: float = flag(0.1, "Dropout on the residual branches and the embedding", at_least=0, below=1)
    add_position_embedding: bool = flag(
        True,
        "Learned position embedding (kept for old Megatron command lines that use rope)",
        off="--no-position-embedding",
    )
