// Matrix products with their epilogues on the CPU: nearest centroid (never writes the [N, C] scores) and projection.
// Compiled once per instruction set, with fused multiply-adds.
//
// The columns (centroids, axes) are packed into panels [D, P]: P consecutive numbers are P columns at one feature. A tile of
// kTileRows rows times one panel stays in vector registers while it runs over the features. Features run in chunks so that
// a panel's chunk stays in the second-level cache while kBlockRows rows pass over it.
#include "arithmetic.h"
#include "cpu_loops.h"

namespace megatron_lsh {
namespace {

// Register tiles: rows x 3 vectors of accumulators, and room left for the panel and one row's number.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8;
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
#endif
constexpr int kTileVectors = 3;
constexpr int64_t kChunk = 512;  // features

static_assert(kBlockRows % kTileRows == 0, "a block is a whole number of tiles");

template <class A>
struct Vector {
    typedef A type __attribute__((vector_size(kVectorBytes), aligned(sizeof(A))));
    static constexpr int64_t lanes = kVectorBytes / sizeof(A);
    static constexpr int64_t panel = lanes * kTileVectors;
};

// The first kVectors vectors of a tile: the last panel of a matrix need not be full. Features of a row are `step` apart.
template <class A, int kVectors>
void multiply_tile(const A* const* rows, int64_t step, const A* panel, int64_t features, bool first, A* tile) {
    using V = typename Vector<A>::type;
    V acc[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = first ? V{} : reinterpret_cast<const V*>(tile)[r * kTileVectors + v];
    for (int64_t d = 0; d < features; ++d) {
        const V* column = reinterpret_cast<const V*>(panel + d * Vector<A>::panel);
        V b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = column[v];
        for (int r = 0; r < kTileRows; ++r)
            for (int v = 0; v < kVectors; ++v) acc[r][v] += rows[r][d * step] * b[v];
    }
    for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kVectors; ++v) reinterpret_cast<V*>(tile)[r * kTileVectors + v] = acc[r][v];
}

// The rows of a block in the type of the arithmetic: in place where they have it, else widened into `buffer`.
template <class T, class A = Acc<T>>
void row_pointers(const T* source, const int64_t* index, const RowBlock& block, int64_t features, A* buffer,
                  const A** rows) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
        // The last block repeats its last row; the surplus results are dropped.
        const int64_t n = block.first_row + (r < block.num_rows ? r : block.num_rows - 1);
        const T* x = source + source_of(index, n) * features;
        if constexpr (sizeof(T) == sizeof(A)) {
            rows[r] = reinterpret_cast<const A*>(x);
        } else {
            A* copy = buffer + r * features;
            for (int64_t d = 0; d < features; ++d) copy[d] = widen(x[d]);
            rows[r] = copy;
        }
    }
}

// tiles[r] = rows[r] times the first `columns` columns of a panel, rounded up to whole vectors, for all rows of a block.
template <class A>
void multiply_panel(const A* const* rows, int64_t num_rows, const A* panel, int64_t columns, int64_t features, A* tiles,
                    int64_t step = 1) {
    constexpr int64_t P = Vector<A>::panel, lanes = Vector<A>::lanes;
    const auto multiply = columns <= lanes       ? multiply_tile<A, 1>
                          : columns <= 2 * lanes ? multiply_tile<A, 2>
                                                 : multiply_tile<A, kTileVectors>;
    for (int64_t d = 0; d < features; d += kChunk) {
        const int64_t chunk = features - d < kChunk ? features - d : kChunk;
        for (int64_t r = 0; r < num_rows; r += kTileRows) {
            const A* shifted[kTileRows];
            for (int i = 0; i < kTileRows; ++i) shifted[i] = rows[r + i] + d * step;
            multiply(shifted, step, panel + d * P, chunk, d == 0, tiles + r * P);
        }
    }
}

// Columns of a row of tiles; a whole panel's are few vectors.
template <class A>
void copy_columns(const A* from, int64_t columns, A* to) {
    constexpr int64_t P = Vector<A>::panel;
    if (columns == P)
        for (int64_t j = 0; j < P; ++j) to[j] = from[j];
    else
        for (int64_t j = 0; j < columns; ++j) to[j] = from[j];
}

template <class A>
A* half_norms(const NearestArgs& a, int64_t num_panels) {
    return static_cast<A*>(a.scratch) + num_panels * Vector<A>::panel * a.features;
}

template <class T>
void pack_centroids(const NearestArgs& a, const RowBlock& block, int64_t p, int64_t num_panels) {
    using A = Acc<T>;
    constexpr int64_t P = Vector<A>::panel;
    A* panel = static_cast<A*>(a.scratch) + (block.first_panel + p) * P * a.features;
    A* half_norm = half_norms<A>(a, num_panels) + (block.first_panel + p) * P;
    const int64_t columns = block.num_columns - p * P < P ? block.num_columns - p * P : P;
    const T* column[P];
    A norm[P] = {};
    for (int64_t j = 0; j < columns; ++j)
        column[j] = static_cast<const T*>(a.centroids) + (block.first_column + p * P + j) * a.features;
    for (int64_t d = 0; d < a.features; ++d) {
        A* packed = panel + d * P;
        for (int64_t j = 0; j < columns; ++j) packed[j] = widen(column[j][d]);
        for (int64_t j = columns; j < P; ++j) packed[j] = 0;
        for (int64_t j = 0; j < P; ++j) norm[j] += packed[j] * packed[j];
    }
    // A column that is not there is infinitely far away.
    for (int64_t j = 0; j < P; ++j) half_norm[j] = j < columns ? norm[j] / 2 : A(__builtin_inf());
}

// |x|^2, in several running sums so that additions need not wait for each other.
template <class A>
A squared_norm(const A* x, int64_t features) {
    constexpr int64_t lanes = 2 * Vector<A>::lanes;
    A sums[lanes] = {}, total = 0;
    int64_t d = 0;
    for (; d + lanes <= features; d += lanes)
        for (int64_t l = 0; l < lanes; ++l) sums[l] += x[d + l] * x[d + l];
    for (; d < features; ++d) total += x[d] * x[d];
    for (int64_t l = 0; l < lanes; ++l) total += sums[l];
    return total;
}

template <class T>
void nearest(const NearestArgs& a, const RowBlock& block, int64_t num_panels) {
    using A = Acc<T>;
    using V = typename Vector<A>::type;
    using I = decltype(V{} < V{});
    using Index = decltype(I{}[0] + 0);
    constexpr int64_t P = Vector<A>::panel, lanes = Vector<A>::lanes;
    A* buffer = sizeof(T) == sizeof(A) ? nullptr : new A[kBlockRows * a.features];
    const A* rows[kBlockRows];
    row_pointers<T>(static_cast<const T*>(a.source), a.index, block, a.features, buffer, rows);

    alignas(kVectorBytes) A tiles[kBlockRows * P] = {};
    V best[kBlockRows];
    I best_column[kBlockRows], lane;
    for (int64_t l = 0; l < lanes; ++l) lane[l] = Index(l);
    for (int64_t r = 0; r < block.num_rows; ++r) {
        best[r] = V{} - A(__builtin_inf());
        best_column[r] = I{};
    }
    const int64_t panels = (block.num_columns + P - 1) / P;
    for (int64_t p = 0; p < panels; ++p) {
        const A* panel = static_cast<const A*>(a.scratch) + (block.first_panel + p) * P * a.features;
        const V* norm = reinterpret_cast<const V*>(half_norms<A>(a, num_panels) + (block.first_panel + p) * P);
        multiply_panel<A>(rows, block.num_rows, panel, block.num_columns - p * P, a.features, tiles);
        for (int64_t r = 0; r < block.num_rows; ++r) {
            for (int v = 0; v < kTileVectors; ++v) {
                const V score = reinterpret_cast<const V*>(tiles + r * P)[v] - norm[v];
                const I better = score > best[r];  // strictly: the first of equals stays
                best[r] = better ? score : best[r];
                best_column[r] = better ? lane + Index(p * P + v * lanes) : best_column[r];
            }
        }
    }
    for (int64_t r = 0; r < block.num_rows; ++r) {
        A score = best[r][0];
        for (int64_t l = 1; l < lanes; ++l) score = best[r][l] > score ? best[r][l] : score;
        Index column = Index(block.num_columns - 1);
        for (int64_t l = 0; l < lanes; ++l) {
            const bool first = best[r][l] == score && best_column[r][l] < column;
            column = first ? best_column[r][l] : column;
        }
        a.cluster[block.first_row + r] = block.first_column + column;
        static_cast<A*>(a.distance)[block.first_row + r] = squared_norm(rows[r], a.features) - 2 * score;
    }
    delete[] buffer;
}

void pack_rotation(const ProjectArgs& a, int64_t p) {
    constexpr int64_t P = Vector<float>::panel;
    for (int64_t d = 0; d < a.features; ++d) {
        for (int64_t j = 0; j < P; ++j) {
            const int64_t column = p * P + j;
            a.packed[(p * a.features + d) * P + j] = column < a.columns ? a.rotation[d * a.columns + column] : 0.0f;
        }
    }
}

template <class T>
void project(const ProjectArgs& a, const RowBlock& block) {
    constexpr int64_t P = Vector<float>::panel;
    float* buffer = sizeof(T) == sizeof(float) ? nullptr : new float[kBlockRows * a.features];
    const float* rows[kBlockRows];
    row_pointers<T, float>(static_cast<const T*>(a.rows), nullptr, block, a.features, buffer, rows);
    float tiles[kBlockRows * P];
    for (int64_t column = 0; column < a.columns; column += P) {
        const int64_t width = a.columns - column < P ? a.columns - column : P;
        multiply_panel<float>(rows, block.num_rows, a.packed + column * a.features, width, a.features, tiles);
        for (int64_t r = 0; r < block.num_rows; ++r)
            copy_columns(tiles + r * P, width, a.out + (block.first_row + r) * a.columns + column);
    }
    delete[] buffer;
}

// Columns of a product, rounded up to whole panels of any instruction set.
int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

template <class A>
void pack_grouped(const GroupedArgs& a, int64_t g, int64_t p) {
    constexpr int64_t P = Vector<A>::panel;
    const int64_t depth = a.transposed ? a.features : a.widths[g], all = a.transposed ? a.widths[g] : a.features;
    const int64_t columns = all - p * P < P ? all - p * P : P;
    const int64_t size = a.transposed ? padded(a.block) * a.features : padded(a.features) * a.block;
    const A* matrix = static_cast<const A*>(a.matrices) + g * a.block * a.features;
    A* panel = static_cast<A*>(a.packed) + g * size + p * P * depth;
    for (int64_t d = 0; d < depth; ++d) {
        const A* first = a.transposed ? matrix + p * P * a.features + d : matrix + d * a.features + p * P;
        const int64_t step = a.transposed ? a.features : 1;
        for (int64_t j = 0; j < columns; ++j) panel[d * P + j] = first[j * step];
        for (int64_t j = columns; j < P; ++j) panel[d * P + j] = 0;
    }
}

template <class A>
void grouped(const GroupedArgs& a, int64_t g, const RowBlock& block) {
    constexpr int64_t P = Vector<A>::panel;
    const int64_t depth = a.transposed ? a.features : a.widths[g], columns = a.transposed ? a.widths[g] : a.features;
    const int64_t size = a.transposed ? padded(a.block) * a.features : padded(a.features) * a.block;
    const int64_t stride = a.transposed ? a.features : a.block, out_stride = a.transposed ? a.block : a.features;
    const A* rows[kBlockRows];
    row_pointers<A>(static_cast<const A*>(a.rows), a.transposed ? a.order : nullptr, block, stride,
                    static_cast<A*>(nullptr), rows);
    A* out[kBlockRows];
    for (int64_t r = 0; r < block.num_rows; ++r)
        out[r] = static_cast<A*>(a.out) + source_of(a.transposed ? nullptr : a.order, block.first_row + r) * out_stride;
    alignas(kVectorBytes) A tiles[kBlockRows * P] = {};
    for (int64_t column = 0; column < columns; column += P) {
        const int64_t width = columns - column < P ? columns - column : P;
        const A* panel = static_cast<const A*>(a.packed) + g * size + column * depth;
        multiply_panel<A>(rows, block.num_rows, panel, width, depth, tiles);
        for (int64_t r = 0; r < block.num_rows; ++r) copy_columns(tiles + r * P, width, out[r] + column);
    }
    for (int64_t r = 0; r < block.num_rows; ++r)
        for (int64_t j = columns; j < out_stride; ++j) out[r][j] = 0;
}

// Columns [P p, ...) of a group's product. Its rows are the columns of `left`.
template <class A>
void grouped_outer(const GroupedOuterArgs& a, int64_t g, int64_t p) {
    constexpr int64_t P = Vector<A>::panel;
    const int64_t count = a.counts[g], width = a.widths[g];
    const int64_t columns = a.features - p * P < P ? a.features - p * P : P;
    A* panel = new A[count * P];
    for (int64_t n = 0; n < count; ++n) {
        const int64_t row = source_of(a.order, a.starts[g] + n);
        const A* right = static_cast<const A*>(a.right) + row * a.features + p * P;
        copy_columns(right, columns, panel + n * P);
        for (int64_t j = columns; j < P; ++j) panel[n * P + j] = 0;
    }
    const A* left = static_cast<const A*>(a.left) + a.starts[g] * a.block;
    A* out = static_cast<A*>(a.out) + g * a.block * a.features + p * P;
    alignas(kVectorBytes) A tiles[kBlockRows * P] = {};
    for (int64_t i = 0; i < width; i += kBlockRows) {
        const int64_t num_rows = width - i < kBlockRows ? width - i : kBlockRows;
        const A* rows[kBlockRows];
        for (int64_t r = 0; r < kBlockRows; ++r) rows[r] = left + i + (r < num_rows ? r : num_rows - 1);
        multiply_panel<A>(rows, num_rows, panel, columns, count, tiles, a.block);
        for (int64_t r = 0; r < num_rows; ++r) copy_columns(tiles + r * P, columns, out + (i + r) * a.features);
    }
    delete[] panel;
}

// Of an operation for fp32 and fp64.
#define LSH_BY_DTYPE(name, parameters, arguments)                         \
    void name##_any parameters { (a.dtype == kFloat64 ? name<double> : name<float>)arguments; }
LSH_BY_DTYPE(pack_grouped, (const GroupedArgs& a, int64_t g, int64_t p), (a, g, p))
LSH_BY_DTYPE(grouped, (const GroupedArgs& a, int64_t g, const RowBlock& block), (a, g, block))
LSH_BY_DTYPE(grouped_outer, (const GroupedOuterArgs& a, int64_t g, int64_t p), (a, g, p))

void pack_centroids_any(const NearestArgs& a, const RowBlock& block, int64_t p, int64_t num_panels) {
    (a.dtype == kFloat32    ? pack_centroids<float>
     : a.dtype == kFloat16  ? pack_centroids<Half>
     : a.dtype == kBFloat16 ? pack_centroids<BFloat16>
                            : pack_centroids<double>)(a, block, p, num_panels);
}

void nearest_any(const NearestArgs& a, const RowBlock& block, int64_t num_panels) {
    (a.dtype == kFloat32    ? nearest<float>
     : a.dtype == kFloat16  ? nearest<Half>
     : a.dtype == kBFloat16 ? nearest<BFloat16>
                            : nearest<double>)(a, block, num_panels);
}

void project_any(const ProjectArgs& a, const RowBlock& block) {
    (a.dtype == kFloat32 ? project<float> : a.dtype == kFloat16 ? project<Half> : project<BFloat16>)(a, block);
}

}  // namespace

extern const MatrixLoops LSH_JOIN(matrix_loops_, LSH_ISA) = {
    Vector<float>::panel, Vector<double>::panel, pack_centroids_any, nearest_any, pack_rotation, project_any,
    pack_grouped_any,     grouped_any,           grouped_outer_any,
};

}  // namespace megatron_lsh
