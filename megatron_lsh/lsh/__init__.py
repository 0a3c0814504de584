"""The idea itself, as functions on tensors: hash, cluster, compress, restore. Knows no process group.

Legend: N routed rows (sorted by expert), D features, Q hashes, W width of a hash, E experts, C clusters.
The method is explained in ``docs/lsh.md``; the source is "LSH-MoE: Communication-efficient MoE Training via
Locality-Sensitive Hashing" (arXiv 2411.08446, NeurIPS 2024).
"""

from megatron_lsh.lsh.budget import cluster_by_budget, cluster_projection, row_budgets
from megatron_lsh.lsh.cluster import Clusters, cluster_by_code
from megatron_lsh.lsh.compress import compress, residual_energy
from megatron_lsh.lsh.fused import clusters_of_slots, compress_tokens, restore_tokens
from megatron_lsh.lsh.hash import hash_rows, make_rotation, project
from megatron_lsh.lsh.interpolate import interpolate, prepare_interpolation
from megatron_lsh.lsh.leading import interpolate_leading, prepare_leading
from megatron_lsh.lsh.members import Members, compress_to_members, measured_members, nearest_members
from megatron_lsh.lsh.refine import refine
from megatron_lsh.lsh.restore import restore, straight_through
from megatron_lsh.lsh.tensor_cores import has_tensor_cores
from megatron_lsh.ops.clustering import cluster_sizes, codes_of, expert_of_row, nearest_centroid

__all__ = [
    "Clusters",
    "Members",
    "cluster_by_budget",
    "cluster_by_code",
    "cluster_projection",
    "cluster_sizes",
    "clusters_of_slots",
    "codes_of",
    "compress",
    "compress_to_members",
    "compress_tokens",
    "expert_of_row",
    "has_tensor_cores",
    "hash_rows",
    "interpolate",
    "interpolate_leading",
    "make_rotation",
    "measured_members",
    "nearest_centroid",
    "nearest_members",
    "prepare_interpolation",
    "prepare_leading",
    "project",
    "refine",
    "residual_energy",
    "restore",
    "restore_tokens",
    "row_budgets",
    "straight_through",
]
