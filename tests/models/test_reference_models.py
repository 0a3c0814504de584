"""The same weights give the same logits as the Hugging Face implementations of Llama and GPT-2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.models.gpt import GPTModel
from tests.models.model_helpers import LLAMA_LIKE, VOCAB, load, make_batch, make_config, make_gpt, pack_qkv, shake

transformers = pytest.importorskip("transformers")


def test_llama() -> None:
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    shake(reference)
    hf = reference.state_dict()
    weights = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(2):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (hf[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        weights |= {
            ours + "input_layernorm.weight": hf[theirs + "input_layernorm.weight"],
            ours + "self_attention.linear_qkv.weight": pack_qkv(q, k, v, groups=2),
            ours + "self_attention.linear_proj.weight": hf[theirs + "self_attn.o_proj.weight"],
            ours + "pre_mlp_layernorm.weight": hf[theirs + "post_attention_layernorm.weight"],
            ours + "mlp.linear_fc1.weight": torch.stack(
                (hf[theirs + "mlp.gate_proj.weight"], hf[theirs + "mlp.up_proj.weight"])
            ),
            ours + "mlp.linear_fc2.weight": hf[theirs + "mlp.down_proj.weight"],
        }
    model = make_gpt(make_config(**LLAMA_LIKE)).eval()
    load(model, weights)
    check_logits(model, reference)


def test_gpt2() -> None:
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    )
    shake(reference)
    hf = reference.state_dict()
    weights = {
        "embedding.word_embeddings.weight": hf["transformer.wte.weight"],
        "embedding.position_embeddings.weight": hf["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": hf["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": hf["transformer.ln_f.bias"],
    }
    for layer in range(2):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = (
                hf[f"{theirs}attn.c_attn.{kind}"].mT.chunk(3)
                if kind == "weight"
                else hf[f"{theirs}attn.c_attn.bias"].chunk(3)
            )

            def linear(name: str, theirs: str = theirs, kind: str = kind) -> Tensor:
                value = hf[f"{theirs}{name}.{kind}"]  # GPT-2 stores [in, out]
                return value.mT if value.dim() == 2 else value

            weights |= {
                f"{ours}input_layernorm.{kind}": hf[f"{theirs}ln_1.{kind}"],
                f"{ours}self_attention.linear_qkv.{kind}": pack_qkv(q, k, v, groups=4),
                f"{ours}self_attention.linear_proj.{kind}": linear("attn.c_proj"),
                f"{ours}pre_mlp_layernorm.{kind}": hf[f"{theirs}ln_2.{kind}"],
                f"{ours}mlp.linear_fc1.{kind}": linear("mlp.c_fc"),
                f"{ours}mlp.linear_fc2.{kind}": linear("mlp.c_proj"),
            }
    model = make_gpt(make_config(openai_gelu=True)).eval()
    load(model, weights)
    check_logits(model, reference)


@torch.no_grad()
def check_logits(model: GPTModel, reference: nn.Module) -> None:
    tokens, labels = make_batch()
    expected = reference.eval()(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    loss, aux_loss = model(tokens, labels)
    torch.testing.assert_close(
        loss, nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none"), rtol=1e-4, atol=1e-4
    )
    assert aux_loss == 0
