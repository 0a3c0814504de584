"""The operations on rows that the LSH dispatcher is made of, each in two forms: a kernel of ``kernels/``, and plain PyTorch.

    ops = choose(rows_ND)                     kernels or plain PyTorch: switch, device and dtype decide, here and once
    mean_CD = ops.segment(rows_ND, ...)       forward
    ctx.ops = ops                             and an autograd function's backward computes with what its forward chose

On a GPU backward runs on a thread of its own, which sees no context variable; that is why the choice travels in ``ctx``.

``PlainOps`` (plain.py) says what each operation computes and is the reference; ``KernelOps`` (kernels.py) replaces those for
which there are kernels; ``library.py`` loads and declares them. The ground floor of the package: it imports nothing else.

Legend: N rows sorted by expert, M rows of a source, D features, C clusters, E experts, T tokens, K choices per token,
P = Q W columns of a projection. Rows need not be materialised: where an operation takes ``index`` (int64 [N]), row n is row
``index[n]`` of a source that has one row per token; with None, row n is row n. ``row_ends`` and ``cluster_ends`` (int64 [E])
are cumulative counts. ``order`` [N], ``offsets`` [C] and ``sizes`` [C] (int64) say which rows a cluster has: ``size`` of
them, from ``offset`` on in ``order``.
"""

from megatron_lsh.ops.choice import choose, describe, reference_only
from megatron_lsh.ops.dtypes import accumulator
from megatron_lsh.ops.groups import Groups
from megatron_lsh.ops.plain import PlainOps, by_row
from megatron_lsh.ops.transfer import to_device

__all__ = ["Groups", "PlainOps", "accumulator", "by_row", "choose", "describe", "reference_only", "to_device"]
