// The C interface of the kernels: plain structs and functions, no torch, no C++ types.
//
// Almost every operation exists twice, as lsh_<name>_cpu and lsh_<name>_cuda, and computes the same thing. Pointers are to
// contiguous arrays; shapes are in the comments. Legend: N rows sorted by expert, D features, C clusters, E experts, T
// tokens, K slots per token, Q hashes. A null optional pointer means "not there". All sizes are 64 bits. A function returns
// 0, or a CUDA error code.
//
// Rows need not be materialised: where an operation takes `index` [N], row n is row index[n] of a source with M rows (its
// token); without, row n is row n, and M = N.
#pragma once

#include <cstdint>

namespace megatron_lsh {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// key[n] = (expert of n, code_1, ..., code_Q) of the projection of row n.
struct HashArgs {
    const float* projection;  // [M, Q * width]
    const int64_t* index;     // [N] optional
    const int64_t* row_ends;  // [E] end of each expert's rows
    uint64_t* key;            // [N]
    int64_t rows, experts, width;
    int32_t num_hashes, code_bits;
};

// Cut each expert's rows, sorted by key, at its budget's weakest links.
struct PlanArgs {
    const uint64_t* key;          // [N]
    const float* projection;      // [M, P]
    const int64_t* index;         // [N] optional
    const int64_t* row_ends;      // [E]
    const int64_t* cluster_ends;  // [E] end of each expert's clusters
    int64_t* cluster;             // [N] out: cluster of each row
    int64_t* order;               // [N] out: rows by cluster
    int64_t* sizes;               // [C] out
    int64_t* offsets;             // [C] out: begin of each cluster in order
    uint64_t* scratch;            // [6 N + C], CUDA only
    int64_t rows, experts, clusters, features;
    int32_t num_hashes, code_bits;
};

// out[n, p] = sum_d rows[n, d] * rotation[d, p]. CPU only; on a GPU it is a matrix product of the library.
struct ProjectArgs {
    const void* rows;       // [N, D]
    const float* rotation;  // [D, P]
    float* out;             // [N, P]
    float* packed;          // [ceil(P / kPanel) * kPanel, D] scratch
    int64_t num_rows, features, columns;
    DType dtype;
};

// Rows in groups, and one matrix for each group: places [start, start + count) of group g times matrix g, of whose B rows the
// first `width` are there. At place n is row order[n] of what has X columns, and row n of what has B. Groups are in order and
// do not overlap. Rows of no group, and what is beyond a width, become zero. CPU only; on a GPU these are the library's
// batched products.
struct GroupedArgs {
    const void* rows;       // [N, B], or [N, X] if transposed
    const void* matrices;   // [G, B, X]
    const int64_t* starts;  // [G]
    const int64_t* counts;  // [G]
    const int64_t* widths;  // [G]
    const int64_t* order;   // [N] optional: a permutation; without, row n is at place n
    void* out;              // [N, X] rows * matrix; [N, B] rows * matrix^T if transposed
    void* packed;           // scratch: G times the matrix, its columns rounded up to kPanel
    int64_t num_rows, groups, block, features;
    int32_t transposed;
    DType dtype;  // fp32 or fp64
};

// out[g] = left^T right over the rows of group g.
struct GroupedOuterArgs {
    const void* left;       // [N, B]
    const void* right;      // [N, X]
    const int64_t* starts;  // [G]
    const int64_t* counts;  // [G]
    const int64_t* widths;  // [G]
    const int64_t* order;   // [N] optional
    void* out;              // [G, B, X]
    int64_t num_rows, groups, block, features;
    DType dtype;  // fp32 or fp64
};

// The nearest centroid of each row among those of its expert.
struct NearestArgs {
    const void* source;           // [M, D]
    const int64_t* index;         // [N] optional
    const void* centroids;        // [C, D]
    const int64_t* row_ends;      // [E]
    const int64_t* cluster_ends;  // [E]
    int64_t* cluster;             // [N] out
    void* distance;               // [N] out: squared distance, fp32 (fp64 for fp64)
    void* scratch;                // CUDA: fp32 [C + M]. CPU: packed centroids, see kPanel
    int64_t rows, clusters, features, experts;
    int64_t sources;  // M
    DType dtype;
};

// Give each expert's empty clusters its farthest rows, one each, though no cluster its last; and put the clusters in order.
struct RegroupArgs {
    const int64_t* nearest;       // [N] cluster of each row
    const float* distance;        // [N]
    const int64_t* row_ends;      // [E]
    const int64_t* cluster_ends;  // [E]
    int64_t* cluster;             // [N] out
    int64_t* order;               // [N] out
    int64_t* sizes;               // [C] out
    int64_t* offsets;             // [C] out
    uint64_t* scratch;            // [6 N + C], CUDA only
    int64_t rows, experts, clusters;
};

// out[j] = sum (or mean) over the rows n of cluster j of weight[n] * row n; residual[n] = row n - out[j].
struct SegmentArgs {
    const void* source;      // [M, D]
    const int64_t* index;    // [N] optional
    const void* weight;      // [N] optional, fp32 (fp64 for fp64)
    const int64_t* order;    // [N]
    const int64_t* offsets;  // [C]
    const int64_t* sizes;    // [C]
    void* out;               // [C, D]
    void* residual;          // [N, D] optional out
    float* scratch;          // [N / kWindow, D], CUDA only
    int64_t rows, clusters, features;
    int32_t mean;
    DType dtype;
};

// Of each cluster the row nearest to its mean, the first of equals. An empty cluster has the row at its place in the order.
struct MembersArgs {
    const void* rows;        // [N, D]
    const int64_t* order;    // [N]
    const int64_t* offsets;  // [C]
    const int64_t* sizes;    // [C]
    int64_t* member;         // [C] out
    void* energy;            // [C, 2] out: sum of |x - member|^2 and of |x|^2 over its rows, fp32 (fp64 for fp64)
    void* distance;          // [N] scratch: |x - mean|^2 of the row at each place of the order
    int64_t num_rows, clusters, features;
    DType dtype;
};

// out[t] = sum_k weight[t, k] * (source[i] + (row[t] - centroid[i])), i = index[t, k]; slots with i < 0 are skipped.
struct CombineArgs {
    const void* source;    // [C, D]
    const int64_t* index;  // [T, K]
    const void* weight;    // [T, K] optional
    const void* row;       // [T, D] optional
    const void* centroid;  // [C, D] with row; without it the row is added whole
    void* out;             // [T, D]
    int64_t tokens, slots, features;
    DType dtype;
};

// out[t, k] = sum_d grad[t, d] * (source[i, d] + (row[t, d] - centroid[i, d])), i = index[t, k]; 0 where i < 0.
struct DotsArgs {
    const void* grad;      // [T, D]
    const void* source;    // [C, D]
    const int64_t* index;  // [T, K]
    const void* row;       // [T, D] optional
    const void* centroid;  // [C, D] with row
    void* out;             // [T, K] fp32 (fp64 for fp64)
    int64_t tokens, slots, features;
    DType dtype;
};

// out[t] = sum_k (weight[t, k] * grad[t] - sum[i] / size[i]) + grad_centroid[i] / size[i], i = index[t, k]; the bracket is
// zero for clusters of one row. The first part is there with grad and sum, the second with grad_centroid.
struct SpreadArgs {
    const void* grad;           // [T, D] optional
    const void* weight;         // [T, K] optional
    const void* sum;            // [C, D] with grad
    const void* grad_centroid;  // [C, D] optional
    const int64_t* index;       // [T, K]
    const int64_t* sizes;       // [C]
    void* out;                  // [T, D]
    int64_t tokens, slots, features;
    DType dtype;
};

// Restoration by differences (differences.cu): CUDA only. G blocks of B places; blocks are runs of clusters, block g has
// widths[g] of them from starts[g] on, in its first places.

// offset[n] = rows[order[n]] - representatives[cluster[n]], and square[n] = |offset[n]|^2.
struct DifferencesArgs {
    const void* rows;             // [N, D]
    const int64_t* order;         // [N] optional
    const int64_t* cluster;       // [N]
    const void* representatives;  // [C, D]
    void* offset;                 // [N, D] out
    float* square;                // [N] out
    int64_t num_rows, features;
    DType dtype;
};

// Rows of clusters to their places, less a mean.
struct PlaceArgs {
    const void* source;     // [C, D]
    const int64_t* starts;  // [G]
    const int64_t* widths;  // [G]
    const void* mean;       // [G, D] optional
    void* out;              // [G, B, D]
    int64_t groups, places, features;
    DType dtype;
};

// scale = kernel_width times the mean squared distance of two points; among = exp(-|c_i - c_j|^2 / scale), system = that and
// ridge on the diagonal, the identity where there is no point.
struct FitArgs {
    const float* products;  // [G, B, B] of the points
    const int64_t* widths;  // [G]
    float* scale;           // [G] out
    float* among;           // [G, B, B] out
    float* system;          // [G, B, B] out
    int64_t groups, places;
    float ridge, kernel_width;
};

// Of positive definite matrices of at most so many rows: lower triangular T, with T^T T the inverse.
constexpr int64_t kMostHalf = 128;
struct HalfInverseArgs {
    const float* matrices;  // [G, size, size]
    float* out;             // [G, size, size]
    int64_t groups, size;
};

// The inverse, rows less their mean and that mean in the last column, in two numbers.
struct SplitArgs {
    const float* inverse;   // [G, B, B]
    const int64_t* widths;  // [G]
    void* forward;          // [G, 3 B, B] out: high, low, high
    void* backward;         // [G, 2 B, B] out: high and low, each transposed
    int64_t groups, places;
    DType dtype;
};

// k(x) - k(c_own) of each row, in two numbers: high, high, low.
struct ChangesArgs {
    const void* products;  // [N, B] of offsets and points
    const float* square;   // [N]
    const int64_t* slot;   // [N] the row's cluster's place among the G B
    const bool* moves;     // [N] false: zero
    const float* among;    // [G, B, B]
    const float* scale;    // [G]
    void* out;             // [N, 3 B]
    int64_t num_rows, places;
    DType dtype;
};

struct ChangesBackwardArgs {
    ChangesArgs of;
    const void* grad;  // [N, B] of k(x) - k(c_own)
    void* moving;      // [N, B] out: that of rows that move
    void* difference;  // [N, B] out: 2 / s times that times k(x) - k(c_own)
    void* around;      // [N, B] out: 2 / s times that times k(x)
    void* to_own;      // [N, B] out: around, less its sum at c_own
    float* pull;       // [N] out: that sum
};

// What pairs of points get from rows and from the inverse.
struct PairsArgs {
    const void* by_own;      // [C, B] sums of `moving` by cluster
    const void* difference;  // [C, B] sums of `difference`
    const void* by_inverse;  // [G, B, B] weights^T moving
    const float* among;      // [G, B, B]
    const float* scale;      // [G]
    const int64_t* starts;   // [G]
    const int64_t* widths;   // [G]
    void* out;               // [G, B, B]
    int64_t groups, places;
    DType dtype;
};

// out[order[n]] = x[n] - weight[n] * offset[n].
struct LessArgs {
    const void* x;         // [N, D]
    const float* weight;   // [N]
    const void* offset;    // [N, D]
    const int64_t* order;  // [N] optional
    void* out;             // [N, D]
    int64_t num_rows, features;
    DType dtype;
};

enum WireFormat : int32_t { kFp8 = 0, kInt8 = 1, kInt4 = 2 };

// Rows to bytes: each number divided by the row's scale |x|_max / largest, rounded; then the scale (fp32). A row of the
// payload has wire_bytes(format, D) bytes.
struct EncodeArgs {
    const void* rows;    // [C, D]
    const float* noise;  // [C, D] optional, in [0, 1): round up with the probability of the remainder (not for fp8)
    uint8_t* payload;    // [C, wire_bytes] out
    int64_t num_rows, features;
    WireFormat format;
    DType dtype;
};

struct DecodeArgs {
    const uint8_t* payload;  // [C, wire_bytes]
    void* rows;              // [C, D] out
    int64_t num_rows, features;
    WireFormat format;
    DType dtype;
};

// Features of packed centroids: panels of kPanel centroids, each [D, kPanel]. At most this wide for any instruction set.
constexpr int64_t kPanel = 48;

// Long clusters are summed by windows of this many rows, so that no thread walks a hot cluster alone.
constexpr int64_t kWindow = 128;

#define LSH_DECLARE(name, Args)        \
    int lsh_##name##_cpu(const Args&); \
    int lsh_##name##_cuda(const Args&, void* stream);

extern "C" {
LSH_DECLARE(hash, HashArgs)
LSH_DECLARE(plan, PlanArgs)
LSH_DECLARE(nearest, NearestArgs)
LSH_DECLARE(regroup, RegroupArgs)
LSH_DECLARE(segment, SegmentArgs)
LSH_DECLARE(members, MembersArgs)
LSH_DECLARE(combine, CombineArgs)
LSH_DECLARE(dots, DotsArgs)
LSH_DECLARE(spread, SpreadArgs)
LSH_DECLARE(encode, EncodeArgs)
LSH_DECLARE(decode, DecodeArgs)
int lsh_differences_cuda(const DifferencesArgs&, void* stream);
int lsh_place_cuda(const PlaceArgs&, void* stream);
int lsh_fit_cuda(const FitArgs&, void* stream);
int lsh_half_inverse_cuda(const HalfInverseArgs&, void* stream);
int lsh_split_cuda(const SplitArgs&, void* stream);
int lsh_changes_cuda(const ChangesArgs&, void* stream);
int lsh_changes_backward_cuda(const ChangesBackwardArgs&, void* stream);
int lsh_pairs_cuda(const PairsArgs&, void* stream);
int lsh_less_cuda(const LessArgs&, void* stream);
int lsh_project_cpu(const ProjectArgs&);
int lsh_grouped_cpu(const GroupedArgs&);
int lsh_grouped_outer_cpu(const GroupedOuterArgs&);
}

}  // namespace megatron_lsh
