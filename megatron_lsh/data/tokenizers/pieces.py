"""The text of each token for itself, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lsh.data.tokenizers.tokenizer import Tokenizer

#: Tokens before one that may change its text: a space at the front that only a first token loses, bytes of one character.
_BEFORE = 6


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it.

    A character of several tokens is the last one's; the others give nothing, or a replacement character. Special tokens give
    nothing.
    """
    found = []
    for place in range(len(ids)):
        first = max(place - _BEFORE, 0)
        before, whole = tokenizer.detokenize(ids[first:place]), tokenizer.detokenize(ids[first : place + 1])
        before = before.rstrip("\ufffd")
        found.append(whole[len(before) :] if whole.startswith(before) else tokenizer.detokenize([ids[place]]))
    return found
