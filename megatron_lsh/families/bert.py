"""BERT and RoBERTa: an encoder that predicts masked tokens, and whether two segments are in their order."""

from __future__ import annotations

import torch.nn.functional as F

from megatron_lsh.config import BertConfig
from megatron_lsh.config.classification import BertClassificationConfig
from megatron_lsh.data.samples.bert import BertRecipe
from megatron_lsh.data.samples.kinds import PassageSamples
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.families.classification import classifier
from megatron_lsh.families.family import Batch, Family, Head, text_datasets
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.models.bert import BertModel, bert_stacks
from megatron_lsh.models.classification import HEAD, BertClassifier


def samples(cfg: BertConfig, tokenizer: Tokenizer) -> PassageSamples:
    """Passages of sentences, some of whose tokens are masked."""
    recipe = BertRecipe.of(cfg.bert, bert_stacks(cfg)[0].seq_length, tokenizer)
    return PassageSamples(recipe, cfg.training.seed)


def losses(cfg: BertConfig, model: BertModel, batch: Batch) -> Losses:
    """Cross-entropy of the masked tokens, which is what the log calls lm loss.

    What is minimized besides it: the routers' auxiliary losses, and the cross-entropy of the sentence order (unless
    --bert-no-binary-head), Megatron-LM's sop loss.
    """
    real_BS = batch["padding_mask"]
    loss_BS, order_B2, aux_loss = model(batch["tokens"], batch["token_types"], real_BS, batch["labels"])
    further = {}
    if order_B2 is not None:
        order_loss_B = F.cross_entropy(order_B2.float(), batch["is_random"], reduction="none")
        further["sop loss"] = Mean.of(order_loss_B, real_BS[:, 0])
    loss = Mean.of(loss_BS, batch["loss_mask"])
    return Losses(loss, Mean(aux_loss, loss.count), further)


def head(cfg: BertConfig, vocab_size: int) -> Head:
    """Every position passes the masked-token head, and is projected onto the vocabulary."""
    (encoder,) = bert_stacks(cfg)
    length, hidden = encoder.seq_length, encoder.shape.hidden
    return Head(length * hidden * (hidden + vocab_size), length * vocab_size)


def fresh_parameters(cfg: BertClassificationConfig) -> tuple[str, ...]:
    """A RoBERTa has no pooler."""
    return (HEAD,) if cfg.bert.bert_binary_head else (HEAD, "pooler.")


BERT = Family(
    name="bert",
    config=BertConfig,
    stacks=bert_stacks,
    model=BertModel,
    head=head,
    datasets=text_datasets(samples),
    losses=losses,
    classifier=classifier(
        "BERT classifier",
        BertClassificationConfig,
        bert_stacks,
        BertClassifier,
        fresh_parameters=fresh_parameters,
        unused_parameters=("lm_head.", "output_layer.", "binary_head.", "pooler."),
    ),
)
