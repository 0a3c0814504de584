// The CPU twins: who computes what on which thread. The arithmetic is in arithmetic.h, the loops in cpu_rows.cpp and
// cpu_matrix.cpp.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "cpu_loops.h"

namespace megatron_lsh {
namespace {

// body(begin, end) over [0, count) on torch's threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    if (count == 0) return;
    const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
    torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body));
}

// Items of roughly this many features each: below it, another thread costs more than it brings.
int64_t grain_of(int64_t features) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, features)); }

#if defined(__x86_64__) && !defined(LSH_BASE_ONLY)
// The widest instruction set of this processor, or a lower one that MEGATRON_LSH_ISA (base, v3, v4) asks for.
int isa_level() {
    const char* wanted = std::getenv("MEGATRON_LSH_ISA");
    const int limit = wanted == nullptr ? 4 : std::strcmp(wanted, "base") == 0 ? 1 : std::strcmp(wanted, "v3") == 0 ? 3 : 4;
    __builtin_cpu_init();
    const auto all = [](auto... has) { return (... && (has != 0)); };
    const bool v3 = all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi2"));
    const bool v4 =
        v3 && all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512cd"),
                  __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"));
    return std::min(limit, v4 ? 4 : v3 ? 3 : 1);
}
struct Loops {
    const RowLoops& rows;
    const MatrixLoops& matrix;
};
const Loops& loops() {
    static const int level = isa_level();
    static const Loops v4{row_loops_v4, matrix_loops_v4}, v3{row_loops_v3, matrix_loops_v3};
    static const Loops base{row_loops_base, matrix_loops_base};
    return level == 4 ? v4 : level == 3 ? v3 : base;
}
const RowLoops& row_loops() { return loops().rows; }
const MatrixLoops& matrix_loops() { return loops().matrix; }
#else
const RowLoops& row_loops() { return row_loops_base; }
const MatrixLoops& matrix_loops() { return matrix_loops_base; }
#endif

// One expert's part of a plan: rows [first_row, first_row + num_rows), clusters likewise.
struct Group {
    int64_t first_row, num_rows, first_cluster, num_clusters;
};

template <class Args>
Group group_of(const Args& a, int64_t expert) {
    const int64_t row = begin_of(a.row_ends, expert, a.rows), cluster = begin_of(a.cluster_ends, expert, a.clusters);
    return {row, end_of(a.row_ends, expert, a.rows) - row, cluster, end_of(a.cluster_ends, expert, a.clusters) - cluster};
}

// Given the cluster of each row (out.cluster), fill sizes, offsets and order: a stable counting sort.
template <class Args>
void order_group(const Args& out, const Group& g) {
    int64_t* sizes = out.sizes + g.first_cluster;
    std::fill(sizes, sizes + g.num_clusters, 0);
    const int64_t end = g.first_row + g.num_rows;
    for (int64_t n = g.first_row; n < end; ++n) ++sizes[out.cluster[n] - g.first_cluster];
    std::vector<int64_t> next(g.num_clusters);
    int64_t offset = g.first_row;
    for (int64_t c = 0; c < g.num_clusters; ++c) {
        out.offsets[g.first_cluster + c] = next[c] = offset;
        offset += sizes[c];
    }
    for (int64_t n = g.first_row; n < end; ++n) out.order[next[out.cluster[n] - g.first_cluster]++] = n;
}

double squared_gap(const PlanArgs& a, int64_t n, int64_t m) {
    const float* x = a.projection + source_of(a.index, n) * a.features;
    const float* y = a.projection + source_of(a.index, m) * a.features;
    double sum = 0;
    for (int64_t p = 0; p < a.features; ++p) {
        const double gap = x[p] - y[p];
        sum += gap * gap;
    }
    return sum;
}

void plan_group(const PlanArgs& a, const Group& g) {
    const int64_t rows = g.num_rows;
    std::vector<std::pair<uint64_t, int64_t>> sorted(rows), links(rows);
    for (int64_t i = 0; i < rows; ++i) sorted[i] = {a.key[g.first_row + i], g.first_row + i};
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 0; i < rows; ++i) {
        double strength = kNoLink;
        if (i > 0) {
            const int common = common_codes(sorted[i].first, sorted[i - 1].first, a.num_hashes, a.code_bits);
            strength = link_strength(common, squared_gap(a, sorted[i].second, sorted[i - 1].second));
        }
        links[i] = {ordered(strength), i};
    }
    // A cluster starts at each of the weakest links; it ends before the next start.
    std::nth_element(links.begin(), links.begin() + (g.num_clusters - 1), links.end());
    std::vector<char> starts(rows, 0);
    for (int64_t i = 0; i < g.num_clusters; ++i) starts[links[i].second] = 1;
    int64_t cluster = -1;
    for (int64_t i = 0; i < rows; ++i) {
        cluster += starts[i];
        a.cluster[sorted[i].second] = cluster;
    }
    // Number clusters by their first rows.
    std::vector<int64_t> number(g.num_clusters, -1);
    int64_t next = g.first_cluster;
    for (int64_t n = g.first_row; n < g.first_row + rows; ++n) {
        int64_t& mine = number[a.cluster[n]];
        if (mine < 0) mine = next++;
        a.cluster[n] = mine;
    }
    order_group(a, g);
}

void regroup_group(const RegroupArgs& a, const Group& g) {
    std::vector<int64_t> sizes(g.num_clusters, 0), empty;
    for (int64_t i = 0; i < g.num_rows; ++i) {
        const int64_t n = g.first_row + i;
        a.cluster[n] = a.nearest[n];
        ++sizes[a.nearest[n] - g.first_cluster];
    }
    for (int64_t c = 0; c < g.num_clusters; ++c) {
        if (sizes[c] == 0) empty.push_back(g.first_cluster + c);
    }
    if (!empty.empty()) {
        // Farthest first; among equally far rows the earlier one. The last row of each cluster in this order stays, so that
        // no cluster is emptied to fill another.
        const auto farness = [&](int64_t n) { return std::pair<uint32_t, int64_t>{~ordered(a.distance[n]), n}; };
        std::vector<int64_t> stays(g.num_clusters, -1);
        for (int64_t n = g.first_row; n < g.first_row + g.num_rows; ++n) {
            int64_t& row = stays[a.nearest[n] - g.first_cluster];
            if (row < 0 || farness(row) < farness(n)) row = n;
        }
        std::vector<std::pair<uint32_t, int64_t>> farthest;
        for (int64_t n = g.first_row; n < g.first_row + g.num_rows; ++n)
            if (stays[a.nearest[n] - g.first_cluster] != n) farthest.push_back(farness(n));
        const auto last = farthest.begin() + std::min(empty.size(), farthest.size());
        std::partial_sort(farthest.begin(), last, farthest.end());
        for (auto it = farthest.begin(); it != last; ++it) a.cluster[it->second] = empty[it - farthest.begin()];
    }
    order_group(a, g);
}

// The work of a nearest-centroid pass: panels of centroids to pack, then blocks of rows to compare with them. A panel is
// described by the first block that needs it.
struct NearestWork {
    std::vector<std::pair<RowBlock, int64_t>> panels;
    std::vector<RowBlock> blocks;
};

NearestWork nearest_work(const NearestArgs& a, int64_t panel) {
    NearestWork work;
    for (int64_t e = 0; e < a.experts; ++e) {
        const Group g = group_of(a, e);
        RowBlock block{g.first_row, 0, g.first_cluster, g.num_clusters, int64_t(work.panels.size())};
        for (int64_t p = 0; p * panel < g.num_clusters; ++p) work.panels.emplace_back(block, p);
        for (int64_t r = 0; r < g.num_rows; r += kBlockRows) {
            block.first_row = g.first_row + r;
            block.num_rows = std::min(kBlockRows, g.num_rows - r);
            work.blocks.push_back(block);
        }
    }
    return work;
}

// What no group writes: rows at places between groups.
void clear_gaps(const GroupedArgs& a, const int64_t* order, int64_t row_bytes) {
    char* out = static_cast<char*>(a.out);
    int64_t end = 0;
    for (int64_t g = 0; g <= a.groups; ++g) {
        const int64_t start = g < a.groups ? a.starts[g] : a.num_rows;
        for (int64_t n = end; n < start; ++n) std::memset(out + source_of(order, n) * row_bytes, 0, row_bytes);
        if (g < a.groups) end = start + a.counts[g];
    }
}

// body(i, j) for i < outer, j < inner.
template <class Body>
void for_pairs(int64_t outer, int64_t inner, const Body& body) {
    parallel_for(outer * inner, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i / inner, i % inner);
    });
}

}  // namespace

extern "C" {

int lsh_hash_cpu(const HashArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().hash(a, begin, end); };
    parallel_for(a.rows, grain_of(a.num_hashes * a.width), body);
    return 0;
}

int lsh_plan_cpu(const PlanArgs& a) {
    parallel_for(a.experts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
            const Group g = group_of(a, e);
            if (g.num_rows) plan_group(a, g);
        }
    });
    return 0;
}

int lsh_regroup_cpu(const RegroupArgs& a) {
    parallel_for(a.experts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) regroup_group(a, group_of(a, e));
    });
    return 0;
}

int lsh_nearest_cpu(const NearestArgs& a) {
    const MatrixLoops& loops = matrix_loops();
    const NearestWork work = nearest_work(a, a.dtype == kFloat64 ? loops.panel_f64 : loops.panel);
    const int64_t num_panels = work.panels.size();
    parallel_for(num_panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            loops.pack_centroids(a, work.panels[i].first, work.panels[i].second, num_panels);
    });
    parallel_for(work.blocks.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) loops.nearest(a, work.blocks[i], num_panels);
    });
    return 0;
}

int lsh_project_cpu(const ProjectArgs& a) {
    const MatrixLoops& loops = matrix_loops();
    parallel_for((a.columns + loops.panel - 1) / loops.panel, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) loops.pack_rotation(a, p);
    });
    parallel_for((a.num_rows + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t row = b * kBlockRows;
            loops.project(a, {row, std::min(kBlockRows, a.num_rows - row), 0, a.columns, 0});
        }
    });
    return 0;
}

int lsh_grouped_cpu(const GroupedArgs& a) {
    const MatrixLoops& loops = matrix_loops();
    const int64_t panel = a.dtype == kFloat64 ? loops.panel_f64 : loops.panel, bytes = a.dtype == kFloat64 ? 8 : 4;
    const int64_t columns = a.transposed ? a.block : a.features;
    for_pairs(a.groups, (columns + panel - 1) / panel, [&](int64_t g, int64_t p) {
        if (a.counts[g] && p * panel < (a.transposed ? a.widths[g] : a.features)) loops.pack_grouped(a, g, p);
    });
    clear_gaps(a, a.transposed ? nullptr : a.order, columns * bytes);
    std::vector<std::pair<int64_t, RowBlock>> blocks;
    for (int64_t g = 0; g < a.groups; ++g)
        for (int64_t r = 0; r < a.counts[g]; r += kBlockRows)
            blocks.push_back({g, {a.starts[g] + r, std::min(kBlockRows, a.counts[g] - r), 0, 0, 0}});
    parallel_for(blocks.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) loops.grouped(a, blocks[i].first, blocks[i].second);
    });
    return 0;
}

int lsh_grouped_outer_cpu(const GroupedOuterArgs& a) {
    const MatrixLoops& loops = matrix_loops();
    const int64_t panel = a.dtype == kFloat64 ? loops.panel_f64 : loops.panel, bytes = a.dtype == kFloat64 ? 8 : 4;
    const int64_t panels = (a.features + panel - 1) / panel, row_bytes = a.features * bytes;
    char* out = static_cast<char*>(a.out);
    for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t there = a.counts[g] ? a.widths[g] : 0;
        std::memset(out + (g * a.block + there) * row_bytes, 0, (a.block - there) * row_bytes);
    }
    for_pairs(a.groups, panels, [&](int64_t g, int64_t p) {
        if (a.counts[g]) loops.grouped_outer(a, g, p);
    });
    return 0;
}

int lsh_segment_cpu(const SegmentArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().segment(a, begin, end); };
    parallel_for(a.clusters, grain_of(a.features * 4), body);
    return 0;
}

int lsh_members_cpu(const MembersArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().members(a, begin, end); };
    parallel_for(a.clusters, grain_of(a.features * 4), body);
    return 0;
}

int lsh_combine_cpu(const CombineArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().combine(a, begin, end); };
    parallel_for(a.tokens, grain_of(a.features * a.slots), body);
    return 0;
}

int lsh_dots_cpu(const DotsArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().dots(a, begin, end); };
    parallel_for(a.tokens, grain_of(a.features * a.slots), body);
    return 0;
}

int lsh_spread_cpu(const SpreadArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().spread(a, begin, end); };
    parallel_for(a.tokens, grain_of(a.features * a.slots), body);
    return 0;
}

int lsh_encode_cpu(const EncodeArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().encode(a, begin, end); };
    parallel_for(a.num_rows, grain_of(a.features), body);
    return 0;
}

int lsh_decode_cpu(const DecodeArgs& a) {
    const auto body = [&](int64_t begin, int64_t end) { row_loops().decode(a, begin, end); };
    parallel_for(a.num_rows, grain_of(a.features), body);
    return 0;
}

}  // extern "C"

}  // namespace megatron_lsh
