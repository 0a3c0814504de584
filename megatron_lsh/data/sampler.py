"""Which samples a rank reads when: a pure function, so that a resumed run continues exactly where it stopped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def micro_batch_indices(
    consumed_samples: int, micro_batch_size: int, num_micro_batches: int, dp_rank: int, dp_size: int
) -> npt.NDArray[np.int64]:
    """Sample numbers of one rank for the iteration that begins after ``consumed_samples`` samples.

    Micro-step j takes the next ``micro_batch_size * dp_size`` samples, and rank r the r-th part of them. So the run reads
    the samples 0, 1, 2, ... whatever the number of ranks, and regrouping the same micro-batches over more ranks or over
    more micro-steps does not change a global batch.

    Returns:
        int64 [num_micro_batches, micro_batch_size].
    """
    if min(consumed_samples, dp_rank) < 0 or min(micro_batch_size, num_micro_batches) < 1 or dp_rank >= dp_size:
        raise ValueError(
            f"consumed_samples {consumed_samples}, micro_batch_size {micro_batch_size}, num_micro_batches "
            f"{num_micro_batches}, rank {dp_rank} of {dp_size} make no batch"
        )
    first = consumed_samples + (np.arange(num_micro_batches) * dp_size + dp_rank) * micro_batch_size
    return first[:, None] + np.arange(micro_batch_size)
