// The loops of the CPU twins. cpu_rows.cpp and cpu_matrix.cpp are compiled once per instruction set (LSH_ISA) and each fill
// a table; cpu.cpp picks a table at run time, so that a build made on one machine runs on another.
#pragma once

#include "kernels.h"

namespace megatron_lsh {

// Each computes the items [begin, end) of an operation, on one thread.
struct RowLoops {
    void (*hash)(const HashArgs&, int64_t begin, int64_t end);        // rows
    void (*segment)(const SegmentArgs&, int64_t begin, int64_t end);  // clusters
    void (*members)(const MembersArgs&, int64_t begin, int64_t end);  // clusters
    void (*combine)(const CombineArgs&, int64_t begin, int64_t end);  // tokens
    void (*dots)(const DotsArgs&, int64_t begin, int64_t end);        // tokens
    void (*spread)(const SpreadArgs&, int64_t begin, int64_t end);    // tokens
    void (*encode)(const EncodeArgs&, int64_t begin, int64_t end);    // rows
    void (*decode)(const DecodeArgs&, int64_t begin, int64_t end);    // rows
};

// Rows of one expert that are compared to its centroids together, or the rows of a projection.
struct RowBlock {
    int64_t first_row, num_rows;        // at most kBlockRows
    int64_t first_column, num_columns;  // centroids of the expert, or columns of the projection
    int64_t first_panel;                // where they are packed
};
constexpr int64_t kBlockRows = 64;

struct MatrixLoops {
    int64_t panel, panel_f64;  // columns per panel; divide kPanel
    // Lay columns [panel * p, ...) of a block out as [D, panel], with half their squared norms behind all the panels.
    void (*pack_centroids)(const NearestArgs&, const RowBlock&, int64_t p, int64_t num_panels);
    void (*nearest)(const NearestArgs&, const RowBlock&, int64_t num_panels);
    void (*pack_rotation)(const ProjectArgs&, int64_t p);
    void (*project)(const ProjectArgs&, const RowBlock&);
    // Panel p of a group's matrix, then blocks of its rows; panel p of a group's outer product.
    void (*pack_grouped)(const GroupedArgs&, int64_t group, int64_t p);
    void (*grouped)(const GroupedArgs&, int64_t group, const RowBlock&);
    void (*grouped_outer)(const GroupedOuterArgs&, int64_t group, int64_t p);
};

#define LSH_JOIN_(a, b) a##b
#define LSH_JOIN(a, b) LSH_JOIN_(a, b)
extern const RowLoops row_loops_base, row_loops_v3, row_loops_v4;
extern const MatrixLoops matrix_loops_base, matrix_loops_v3, matrix_loops_v4;

}  // namespace megatron_lsh
