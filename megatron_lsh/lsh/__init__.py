"""The idea itself, as functions on tensors: hash, cluster, compress, restore. Knows no process group.

Legend: N routed rows (sorted by expert), D features, Q hashes, W width of a hash, E experts, C clusters.
The method is explained in ``docs/lsh.md``; the source is "LSH-MoE: Communication-efficient MoE Training via
Locality-Sensitive Hashing" (arXiv 2411.08446, NeurIPS 2024).
"""

from megatron_lsh.lsh.cluster import Clusters, cluster_by_code
from megatron_lsh.lsh.compress import compress, residual_energy
from megatron_lsh.lsh.hash import hash_rows, make_rotation
from megatron_lsh.lsh.restore import restore

__all__ = ["Clusters", "cluster_by_code", "compress", "hash_rows", "make_rotation", "residual_energy", "restore"]
