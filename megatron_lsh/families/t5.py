"""T5: an encoder and a decoder that says what was cut out of the encoder's text."""

from __future__ import annotations

from megatron_lsh.config import T5Config
from megatron_lsh.config.classification import T5ClassificationConfig
from megatron_lsh.data.samples.kinds import PassageSamples
from megatron_lsh.data.samples.t5 import T5Recipe
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.families.classification import classifier
from megatron_lsh.families.family import Batch, Family, Head, text_datasets
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.models.classification import T5Classifier
from megatron_lsh.models.t5 import T5Model, t5_encoder_stacks, t5_stacks


def samples(cfg: T5Config, tokenizer: Tokenizer) -> PassageSamples:
    """Passages of sentences, of which spans are cut out."""
    encoder, decoder = t5_stacks(cfg)
    recipe = T5Recipe.of(cfg.t5, encoder.seq_length, decoder.seq_length, tokenizer)
    return PassageSamples(recipe, cfg.training.seed)


def losses(cfg: T5Config, model: T5Model, batch: Batch) -> Losses:
    """Cross-entropy of the spans and their sentinels, and the routers' auxiliary losses."""
    loss_BS, aux_loss = model(
        batch["encoder_tokens"],
        batch["decoder_tokens"],
        batch["encoder_padding_mask"],
        batch["decoder_padding_mask"],
        batch["labels"],
    )
    loss = Mean.of(loss_BS, batch["loss_mask"])
    return Losses(loss, Mean(aux_loss, loss.count))


def head(cfg: T5Config, vocab_size: int) -> Head:
    """Every position of the decoder is projected onto the vocabulary."""
    _, decoder = t5_stacks(cfg)
    return Head(decoder.seq_length * decoder.shape.hidden * vocab_size, decoder.seq_length * vocab_size)


T5 = Family(
    name="t5",
    config=T5Config,
    stacks=t5_stacks,
    model=T5Model,
    head=head,
    datasets=text_datasets(samples),
    losses=losses,
    classifier=classifier(
        "T5 classifier",
        T5ClassificationConfig,
        t5_encoder_stacks,
        T5Classifier,
        unused_parameters=("decoder.", "decoder_relative_pos_emb.", "output_layer."),
    ),
)
