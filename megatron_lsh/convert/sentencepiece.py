"""A SentencePiece model as a tokenizer.json that gives the same ids.

Transformers has converters of its own, one for each architecture, which know the settings of that architecture's tokenizer
and no others. This one follows the settings in the file: SentencePiece's ``normalizer.cc``, ``unigram_model.cc`` and
``bpe_model.cc``. What cannot be said in a tokenizer.json (two ways to merge the same piece that overlap, a prefix before a
user-defined symbol) gives other ids, which is why whoever calls this compares.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"  # a space within pieces
_UNIGRAM, _BPE, _WORD, _CHAR = 1, 2, 3, 4
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
_UNKNOWN_PENALTY = 10.0  # below the least probable piece, in both libraries


def tokenizer_of(content: bytes) -> Tokenizer:
    """The tokenizer of a ``.model`` file that can be read. Its special tokens are not declared: text is only text."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    processor = SentencePieceProcessor(model_proto=content)
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    tokenizer = Tokenizer(_model(proto))
    spec = proto.normalizer_spec
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    prefix = spec.add_dummy_prefix and not proto.trainer_spec.treat_whitespace_as_suffix
    steps = _normalizers(proto, prefix=prefix and not own)
    if spec.precompiled_charsmap and processor.encode("a\r\nb") == processor.encode("a\n\rb"):
        # Both become spaces; together they are one grapheme to Precompiled, which would make them one.
        steps.insert(0, normalizers.Replace("\r\n", "\n\r"))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix and own:  # a normalizer would put it before every part between the symbols
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    elif proto.trainer_spec.model_type == _WORD:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _normalizers(proto: Any, *, prefix: bool) -> list[normalizers.Normalizer]:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""),
        ]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.add_dummy_prefix and proto.trainer_spec.treat_whitespace_as_suffix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), SPACE))
    return steps


def _model(proto: Any) -> models.Model:
    kind, pieces = proto.trainer_spec.model_type, proto.pieces
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    byte_fallback = proto.trainer_spec.byte_fallback
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    if kind == _UNIGRAM:
        return models.Unigram(_scores(pieces), unknown, byte_fallback)
    if kind == _WORD:
        return models.WordLevel(vocabulary, unk_token=pieces[unknown].piece)
    return models.BPE(
        vocab=vocabulary,
        merges=_merges(pieces) if kind == _BPE else [],
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _scores(pieces: Any) -> list[tuple[str, float]]:
    """Log probabilities. Control symbols and bytes, which no text contains, are less probable than any spelling of them."""
    least = min((piece.score for piece in pieces if piece.type == _NORMAL), default=0.0) - _UNKNOWN_PENALTY
    return [
        (piece.piece, piece.score if piece.type == _NORMAL else least * (1 + len(piece.piece.encode())))
        for piece in pieces
    ]


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece merges them: by the score of what they become."""
    known = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = []
    for result in sorted(known, key=lambda piece: -known[piece]):
        cuts = ((result[:cut], result[cut:]) for cut in range(len(result) - 1, 0, -1))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    return merges
