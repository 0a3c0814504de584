"""GPT: a decoder that predicts the next token of text."""

from __future__ import annotations

from megatron_lsh.config import Config
from megatron_lsh.config.classification import ClassificationConfig
from megatron_lsh.data.samples.gpt import SampleRules
from megatron_lsh.data.samples.kinds import GPTSamples
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.families.classification import classifier
from megatron_lsh.families.family import Batch, Family, Head, text_datasets
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.models.attention import document_attention_mask
from megatron_lsh.models.classification import GPTClassifier
from megatron_lsh.models.gpt import GPTModel, gpt_stacks
from megatron_lsh.parallel.context_parallel import own_positions


def samples(cfg: Config, tokenizer: Tokenizer) -> GPTSamples:
    """Windows over joined documents."""
    data = cfg.data
    rules = SampleRules(
        tokenizer.eod, tokenizer.vocab_size, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask
    )
    return GPTSamples(gpt_stacks(cfg)[0].seq_length, cfg.training.seed, rules)


def losses(cfg: Config, model: GPTModel, batch: Batch) -> Losses:
    """Cross-entropy of the next tokens where the loss mask is 1, and the routers' auxiliary losses."""
    sharers = model.ctx.cp  # of every sequence
    position_ids_BS = batch["position_ids"] if cfg.data.reset_position_ids else None
    mask_B1sS = None
    if cfg.data.reset_attention_mask:
        ids_BS = batch["document_ids"]
        mask_B1sS = document_attention_mask(own_positions(ids_BS, sharers), ids_BS)
    loss_Bs, aux_loss = model(batch["tokens"], batch["labels"], position_ids_BS, mask_B1sS)
    loss_mask_BS = batch["loss_mask"]
    main = Mean.share(loss_Bs, own_positions(loss_mask_BS, sharers), loss_mask_BS.sum(), sharers.size)
    return Losses(main, Mean(aux_loss, loss_mask_BS.numel(), sharers.size))


def head(cfg: Config, vocab_size: int) -> Head:
    """Every position is projected onto the vocabulary."""
    (decoder,) = gpt_stacks(cfg)
    return Head(decoder.seq_length * decoder.shape.hidden * vocab_size, decoder.seq_length * vocab_size)


GPT = Family(
    name="gpt",
    config=Config,
    stacks=gpt_stacks,
    model=GPTModel,
    head=head,
    datasets=text_datasets(samples),
    losses=losses,
    classifier=classifier(
        "GPT classifier", ClassificationConfig, gpt_stacks, GPTClassifier, unused_parameters=("output_layer.",)
    ),
)
