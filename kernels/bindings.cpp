// torch.ops.megatron_lsh: checks arguments, allocates results, calls the C interface. Schemas and fake kernels are in
// megatron_lsh/ops/library.py, derivatives where they are used, in megatron_lsh/lsh/ and moe/permute.py.
//
// Compiled for the CPU, for GPUs (LSH_ON_GPU) and for the tests' emulator (LSH_EMULATED).
#include "bindings.h"

namespace megatron_lsh {
namespace {

// 8-byte words the planning kernels sort in; the CPU allocates its own.
int64_t plan_scratch(int64_t rows, int64_t clusters) { return kOnGpu ? 6 * rows + clusters : 0; }

// On the CPU: rows and clusters are all an expert's, and an expert with rows has at least one cluster and at most one for
// each row. A GPU's numbers are not read here; its kernels go no further than their arrays.
void check_ends(const Tensor& row_ends, const Tensor& cluster_ends, int64_t rows, int64_t clusters) {
    if (kOnGpu) return;
    const int64_t *row_end = data<int64_t>(row_ends), *cluster_end = data<int64_t>(cluster_ends), experts = row_ends.size(0);
    STD_TORCH_CHECK(experts > 0 && row_end[experts - 1] == rows, "row_ends must rise to the number of rows, ", rows);
    STD_TORCH_CHECK(cluster_end[experts - 1] == clusters, "cluster_ends must rise to the number of clusters, ", clusters);
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t its_rows = row_end[e] - (e ? row_end[e - 1] : 0),
                      its_clusters = cluster_end[e] - (e ? cluster_end[e - 1] : 0);
        STD_TORCH_CHECK(0 <= its_clusters && its_clusters <= its_rows && (its_clusters > 0 || its_rows == 0), "expert ", e,
                        " has ", its_rows, " rows and ", its_clusters,
                        " clusters: one at least where it has rows, one for each at most");
    }
}

int64_t num_rows(const OptionalTensor& index, const Tensor& source) { return index ? index->size(0) : source.size(0); }

Tensor hash(Tensor projection, OptionalTensor index, Tensor row_ends, int64_t num_hashes, int64_t code_bits) {
    projection = checked(projection, "projection", ScalarType::Float, {-1, -1}, projection);
    index = checked(index, "index", kLong, {-1}, projection);
    row_ends = integers(row_ends, "row_ends", -1, projection);
    STD_TORCH_CHECK(num_hashes > 0 && projection.size(1) % num_hashes == 0, "projection must have num_hashes equal parts");
    const int64_t rows = num_rows(index, projection);
    Tensor key = empty(projection, {rows}, kLong);
    const HashArgs args{data<float>(projection),
                        data<int64_t>(index),
                        data<int64_t>(row_ends),
                        data<uint64_t>(key),
                        rows,
                        row_ends.size(0),
                        projection.size(1) / num_hashes,
                        int32_t(num_hashes),
                        int32_t(code_bits)};
    if (rows) LSH_RUN(hash, projection, args);
    return key;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(Tensor key, Tensor projection, OptionalTensor index, Tensor row_ends,
                                                Tensor cluster_ends, int64_t num_clusters, int64_t num_hashes,
                                                int64_t code_bits) {
    key = integers(key, "key", -1, key);
    const int64_t rows = key.size(0);
    projection = checked(projection, "projection", ScalarType::Float, {index ? -1 : rows, -1}, key);
    index = checked(index, "index", kLong, {rows}, key);
    row_ends = integers(row_ends, "row_ends", -1, key);
    cluster_ends = integers(cluster_ends, "cluster_ends", row_ends.size(0), key);
    Tensor cluster = empty(key, {rows}, kLong), order = empty(key, {rows}, kLong);
    Tensor sizes = empty(key, {num_clusters}, kLong), offsets = empty(key, {num_clusters}, kLong);
    Tensor scratch = empty(key, {plan_scratch(rows, num_clusters)}, kLong);
    const PlanArgs args{data<uint64_t>(key),
                        data<float>(projection),
                        data<int64_t>(index),
                        data<int64_t>(row_ends),
                        data<int64_t>(cluster_ends),
                        data<int64_t>(cluster),
                        data<int64_t>(order),
                        data<int64_t>(sizes),
                        data<int64_t>(offsets),
                        data<uint64_t>(scratch),
                        rows,
                        row_ends.size(0),
                        num_clusters,
                        projection.size(1),
                        int32_t(num_hashes),
                        int32_t(code_bits)};
    check_ends(row_ends, cluster_ends, rows, num_clusters);
    if (rows) LSH_RUN(plan, key, args);
    return {cluster, order, sizes, offsets};
}

std::tuple<Tensor, Tensor> nearest(Tensor rows, OptionalTensor index, Tensor centroids, Tensor row_ends,
                                   Tensor cluster_ends) {
    rows = checked(rows, "rows", rows.scalar_type(), {-1, -1}, rows);
    index = checked(index, "index", kLong, {-1}, rows);
    centroids = checked(centroids, "centroids", rows.scalar_type(), {-1, rows.size(1)}, rows);
    row_ends = integers(row_ends, "row_ends", -1, rows);
    cluster_ends = integers(cluster_ends, "cluster_ends", row_ends.size(0), rows);
    const int64_t count = num_rows(index, rows), clusters = centroids.size(0), features = rows.size(1);
    const int64_t experts = row_ends.size(0);
    Tensor cluster = empty(rows, {count}, kLong), distance = empty(rows, {count}, accumulator(rows));
    const int64_t scratch_size = kOnGpu ? clusters + rows.size(0) : (clusters + experts * kPanel) * (features + 1);
    Tensor scratch = empty(rows, {scratch_size}, accumulator(rows));
    const NearestArgs args{data(rows),
                           data<int64_t>(index),
                           data(centroids),
                           data<int64_t>(row_ends),
                           data<int64_t>(cluster_ends),
                           data<int64_t>(cluster),
                           data(distance),
                           data(scratch),
                           count,
                           clusters,
                           features,
                           experts,
                           rows.size(0),
                           dtype_of(rows)};
    check_ends(row_ends, cluster_ends, count, clusters);
    if (count) LSH_RUN(nearest, rows, args);
    return {cluster, distance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> regroup(Tensor nearest, Tensor distance, Tensor row_ends, Tensor cluster_ends,
                                                   int64_t num_clusters) {
    nearest = integers(nearest, "nearest", -1, nearest);
    const int64_t rows = nearest.size(0);
    distance = checked(distance, "distance", ScalarType::Float, {rows}, nearest);
    row_ends = integers(row_ends, "row_ends", -1, nearest);
    cluster_ends = integers(cluster_ends, "cluster_ends", row_ends.size(0), nearest);
    Tensor cluster = empty(nearest, {rows}, kLong), order = empty(nearest, {rows}, kLong);
    Tensor sizes = empty(nearest, {num_clusters}, kLong), offsets = empty(nearest, {num_clusters}, kLong);
    Tensor scratch = empty(nearest, {plan_scratch(rows, num_clusters)}, kLong);
    const RegroupArgs args{data<int64_t>(nearest),  data<float>(distance),
                           data<int64_t>(row_ends), data<int64_t>(cluster_ends),
                           data<int64_t>(cluster),  data<int64_t>(order),
                           data<int64_t>(sizes),    data<int64_t>(offsets),
                           data<uint64_t>(scratch), rows,
                           row_ends.size(0),        num_clusters};
    check_ends(row_ends, cluster_ends, rows, num_clusters);
    if (rows) LSH_RUN(regroup, nearest, args);
    return {cluster, order, sizes, offsets};
}

void segment_into(Tensor source, OptionalTensor index, OptionalTensor weight, Tensor order, Tensor offsets, Tensor sizes,
                  bool mean, const Tensor& out, const OptionalTensor& residual) {
    source = checked(source, "source", source.scalar_type(), {-1, -1}, source);
    order = integers(order, "order", -1, source);
    const int64_t rows = order.size(0), features = source.size(1), clusters = out.size(0);
    index = checked(index, "index", kLong, {rows}, source);
    STD_TORCH_CHECK(index || source.size(0) == rows, "source must have one row for each row of order");
    weight = checked(weight, "weight", accumulator(source), {rows}, source);
    sizes = integers(sizes, "sizes", clusters, source);
    offsets = integers(offsets, "offsets", clusters, source);
    Tensor scratch = empty(source, {kOnGpu ? rows / kWindow : 0, features}, ScalarType::Float);
    const SegmentArgs args{data(source),
                           data<int64_t>(index),
                           data(weight),
                           data<int64_t>(order),
                           data<int64_t>(offsets),
                           data<int64_t>(sizes),
                           data(out),
                           data(residual),
                           data<float>(scratch),
                           rows,
                           clusters,
                           features,
                           mean ? 1 : 0,
                           dtype_of(source)};
    if (clusters && features) LSH_RUN(segment, source, args);
}

Tensor segment(Tensor source, OptionalTensor index, OptionalTensor weight, Tensor order, Tensor offsets, Tensor sizes,
               bool mean) {
    Tensor out = empty(source, {sizes.size(0), source.size(1)}, source.scalar_type());
    segment_into(source, index, weight, order, offsets, sizes, mean, out, std::nullopt);
    return out;
}

std::tuple<Tensor, Tensor> segment_residual(Tensor source, Tensor order, Tensor offsets, Tensor sizes) {
    Tensor out = empty(source, {sizes.size(0), source.size(1)}, source.scalar_type());
    Tensor residual = empty(source, {source.size(0), source.size(1)}, source.scalar_type());
    segment_into(source, std::nullopt, std::nullopt, order, offsets, sizes, true, out, residual);
    return {out, residual};
}

std::tuple<Tensor, Tensor> members(Tensor rows, Tensor order, Tensor offsets, Tensor sizes) {
    rows = checked(rows, "rows", rows.scalar_type(), {-1, -1}, rows);
    const int64_t num_rows = rows.size(0), features = rows.size(1), clusters = sizes.size(0);
    order = integers(order, "order", num_rows, rows);
    offsets = integers(offsets, "offsets", clusters, rows);
    sizes = integers(sizes, "sizes", clusters, rows);
    STD_TORCH_CHECK(num_rows || !clusters, "there are ", clusters, " clusters of no rows");
    Tensor member = empty(rows, {clusters}, kLong), energy = empty(rows, {clusters, 2}, accumulator(rows));
    Tensor distance = empty(rows, {num_rows}, accumulator(rows));
    const MembersArgs args{data(rows),   data<int64_t>(order), data<int64_t>(offsets), data<int64_t>(sizes),
                           data<int64_t>(member), data(energy), data(distance),        num_rows,
                           clusters,     features,             dtype_of(rows)};
    if (clusters) LSH_RUN(members, rows, args);
    return {member, energy};
}

Tensor combine(Tensor source, Tensor index, OptionalTensor weight, OptionalTensor row, OptionalTensor centroid) {
    source = checked(source, "source", source.scalar_type(), {-1, -1}, source);
    index = checked(index, "index", kLong, {-1, -1}, source);
    const int64_t tokens = index.size(0), slots = index.size(1), features = source.size(1);
    weight = checked(weight, "weight", accumulator(source), {tokens, slots}, source);
    row = checked(row, "row", source.scalar_type(), {tokens, features}, source);
    centroid = checked(centroid, "centroid", source.scalar_type(), {source.size(0), features}, source);
    STD_TORCH_CHECK(row || !centroid, "a centroid needs the row it is taken from");
    Tensor out = empty(source, {tokens, features}, source.scalar_type());
    const CombineArgs args{
        data(source), data<int64_t>(index), data(weight), data(row), data(centroid), data(out), tokens, slots,
        features,     dtype_of(source)};
    if (tokens && features) LSH_RUN(combine, source, args);
    return out;
}

Tensor dots(Tensor grad, Tensor source, Tensor index, OptionalTensor row, OptionalTensor centroid) {
    source = checked(source, "source", source.scalar_type(), {-1, -1}, source);
    index = checked(index, "index", kLong, {-1, -1}, source);
    const int64_t tokens = index.size(0), slots = index.size(1), features = source.size(1);
    grad = checked(grad, "grad", source.scalar_type(), {tokens, features}, source);
    row = checked(row, "row", source.scalar_type(), {tokens, features}, source);
    centroid = checked(centroid, "centroid", source.scalar_type(), {source.size(0), features}, source);
    STD_TORCH_CHECK(bool(row) == bool(centroid), "row and centroid come together");
    Tensor out = empty(source, {tokens, slots}, accumulator(source));
    const DotsArgs args{data(grad), data(source), data<int64_t>(index), data(row), data(centroid), data(out), tokens,
                        slots,      features,     dtype_of(source)};
    if (tokens && slots) LSH_RUN(dots, source, args);
    return out;
}

Tensor spread(OptionalTensor grad, OptionalTensor weight, OptionalTensor sum, OptionalTensor grad_centroid, Tensor index,
              Tensor sizes) {
    STD_TORCH_CHECK(grad || grad_centroid, "nothing to spread");
    STD_TORCH_CHECK(bool(grad) == bool(sum), "grad and sum come together");
    const Tensor& like = grad ? *grad : *grad_centroid;
    index = checked(index, "index", kLong, {-1, -1}, like);
    sizes = integers(sizes, "sizes", -1, like);
    const int64_t tokens = index.size(0), slots = index.size(1), features = like.size(1), clusters = sizes.size(0);
    grad = checked(grad, "grad", like.scalar_type(), {tokens, features}, like);
    weight = checked(weight, "weight", accumulator(like), {tokens, slots}, like);
    sum = checked(sum, "sum", like.scalar_type(), {clusters, features}, like);
    grad_centroid = checked(grad_centroid, "grad_centroid", like.scalar_type(), {clusters, features}, like);
    Tensor out = empty(like, {tokens, features}, like.scalar_type());
    const SpreadArgs args{
        data(grad), data(weight), data(sum), data(grad_centroid), data<int64_t>(index), data<int64_t>(sizes), data(out),
        tokens,     slots,        features,  dtype_of(like)};
    if (tokens && features) LSH_RUN(spread, like, args);
    return out;
}

// Bytes of a row of the payload: `features` numbers and a scale.
int64_t payload_bytes(int64_t format, int64_t features) {
    STD_TORCH_CHECK(format >= kFp8 && format <= kInt4, "unknown wire format ", format);
    return (format == kInt4 ? (features + 1) / 2 : features) + 4;
}

Tensor encode(Tensor rows, OptionalTensor noise, int64_t format) {
    rows = checked(rows, "rows", rows.scalar_type(), {-1, -1}, rows);
    STD_TORCH_CHECK(dtype_of(rows) != kFloat64, "rows must be fp32, fp16 or bf16");
    const int64_t count = rows.size(0), features = rows.size(1);
    noise = checked(noise, "noise", ScalarType::Float, {count, features}, rows);
    Tensor payload = empty(rows, {count, payload_bytes(format, features)}, ScalarType::Byte);
    const EncodeArgs args{data(rows), data<float>(noise), data<uint8_t>(payload), count,
                          features,   WireFormat(format), dtype_of(rows)};
    if (count) LSH_RUN(encode, rows, args);
    return payload;
}

Tensor decode(Tensor payload, int64_t format, int64_t features, ScalarType dtype) {
    payload = checked(payload, "payload", ScalarType::Byte, {-1, payload_bytes(format, features)}, payload);
    const int64_t count = payload.size(0);
    Tensor rows = empty(payload, {count, features}, dtype);
    STD_TORCH_CHECK(dtype_of(rows) != kFloat64, "rows must be fp32, fp16 or bf16");
    const DecodeArgs args{data<uint8_t>(payload), data(rows), count, features, WireFormat(format), dtype_of(rows)};
    if (count && features) LSH_RUN(decode, payload, args);
    return rows;
}

#if !defined(LSH_ON_GPU) && !defined(LSH_EMULATED)
Tensor project(Tensor rows, Tensor rotation) {
    rows = checked(rows, "rows", rows.scalar_type(), {-1, -1}, rows);
    STD_TORCH_CHECK(dtype_of(rows) != kFloat64, "project computes in fp32");
    rotation = checked(rotation, "rotation", ScalarType::Float, {rows.size(1), -1}, rows);
    const int64_t columns = rotation.size(1), padded = (columns + kPanel - 1) / kPanel * kPanel;
    Tensor out = empty(rows, {rows.size(0), columns}, ScalarType::Float);
    Tensor packed = empty(rows, {padded, rows.size(1)}, ScalarType::Float);
    const ProjectArgs args{data(rows),   data<float>(rotation), data<float>(out), data<float>(packed),
                           rows.size(0), rows.size(1),          columns,          dtype_of(rows)};
    LSH_RUN(project, rows, args);
    return out;
}

// Groups lie in order within the rows; widths are at most the block's.
void check_groups(const Tensor& starts, const Tensor& counts, const Tensor& widths, int64_t rows, int64_t block) {
    int64_t end = 0;
    for (int64_t g = 0; g < starts.size(0); ++g) {
        const int64_t start = data<int64_t>(starts)[g], count = data<int64_t>(counts)[g], width = data<int64_t>(widths)[g];
        STD_TORCH_CHECK(end <= start && 0 <= count && start + count <= rows, "group ", g, " of rows ", start, " to ",
                        start + count, " must begin after the group before it and end within ", rows, " rows");
        STD_TORCH_CHECK(0 <= width && width <= block, "group ", g, ": width ", width, " must be within ", block);
        end = start + count;
    }
}

ScalarType fp32_or_fp64(const Tensor& t) {
    STD_TORCH_CHECK(dtype_of(t) == kFloat32 || dtype_of(t) == kFloat64, "grouped products are in fp32 or fp64");
    return t.scalar_type();
}

int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// Places of rows: a permutation, whose range is checked.
OptionalTensor places(const OptionalTensor& order, int64_t rows, const Tensor& home) {
    const OptionalTensor found = checked(order, "order", ScalarType::Long, {rows}, home);
    for (int64_t n = 0; found && n < rows; ++n) {
        const int64_t row = data<int64_t>(*found)[n];
        STD_TORCH_CHECK(0 <= row && row < rows, "order: ", row, " at place ", n, " must be one of ", rows, " rows");
    }
    return found;
}

Tensor grouped(Tensor rows, Tensor matrices, Tensor starts, Tensor counts, Tensor widths, OptionalTensor order,
               bool transposed) {
    const ScalarType dtype = fp32_or_fp64(rows);
    matrices = checked(matrices, "matrices", dtype, {-1, -1, -1}, rows);
    const int64_t groups = matrices.size(0), block = matrices.size(1), features = matrices.size(2);
    rows = checked(rows, "rows", dtype, {-1, transposed ? features : block}, rows);
    starts = integers(starts, "starts", groups, rows);
    counts = integers(counts, "counts", groups, rows);
    widths = integers(widths, "widths", groups, rows);
    const int64_t num_rows = rows.size(0);
    check_groups(starts, counts, widths, num_rows, block);
    order = places(order, num_rows, rows);
    Tensor out = empty(rows, {num_rows, transposed ? block : features}, dtype);
    Tensor packed = empty(rows, {groups, transposed ? padded(block) * features : padded(features) * block}, dtype);
    const GroupedArgs args{data(rows),   data(matrices), data<int64_t>(starts), data<int64_t>(counts),
                           data<int64_t>(widths), data<int64_t>(order), data(out), data(packed),
                           num_rows,     groups,         block,                 features,
                           transposed ? 1 : 0, dtype_of(rows)};
    LSH_RUN(grouped, rows, args);
    return out;
}

Tensor grouped_outer(Tensor left, Tensor right, Tensor starts, Tensor counts, Tensor widths, OptionalTensor order) {
    const ScalarType dtype = fp32_or_fp64(left);
    left = checked(left, "left", dtype, {-1, -1}, left);
    right = checked(right, "right", dtype, {left.size(0), -1}, left);
    const int64_t groups = starts.size(0), num_rows = left.size(0), block = left.size(1), features = right.size(1);
    starts = integers(starts, "starts", groups, left);
    counts = integers(counts, "counts", groups, left);
    widths = integers(widths, "widths", groups, left);
    check_groups(starts, counts, widths, num_rows, block);
    order = places(order, num_rows, left);
    Tensor out = empty(left, {groups, block, features}, dtype);
    const GroupedOuterArgs args{data(left),   data(right), data<int64_t>(starts), data<int64_t>(counts),
                                data<int64_t>(widths), data<int64_t>(order), data(out), num_rows,
                                groups,       block,       features,              dtype_of(left)};
    LSH_RUN(grouped_outer, left, args);
    return out;
}
#endif

void register_ops(torch::stable::detail::StableLibrary& m) {
    m.impl("hash", TORCH_BOX(&hash));
    m.impl("plan", TORCH_BOX(&plan));
    m.impl("nearest", TORCH_BOX(&nearest));
    m.impl("regroup", TORCH_BOX(&regroup));
    m.impl("segment", TORCH_BOX(&segment));
    m.impl("segment_residual", TORCH_BOX(&segment_residual));
    m.impl("members", TORCH_BOX(&members));
    m.impl("combine", TORCH_BOX(&combine));
    m.impl("dots", TORCH_BOX(&dots));
    m.impl("spread", TORCH_BOX(&spread));
    m.impl("encode", TORCH_BOX(&encode));
    m.impl("decode", TORCH_BOX(&decode));
#if !defined(LSH_ON_GPU) && !defined(LSH_EMULATED)
    m.impl("project", TORCH_BOX(&project));
    m.impl("grouped", TORCH_BOX(&grouped));
    m.impl("grouped_outer", TORCH_BOX(&grouped_outer));
#endif
}

}  // namespace

#if defined(LSH_ON_GPU)
STABLE_TORCH_LIBRARY_IMPL(megatron_lsh, CUDA, m) { register_ops(m); }
#elif defined(LSH_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(megatron_lsh_emulated, CPU, m) { register_ops(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(megatron_lsh, CPU, m) { register_ops(m); }
#endif

}  // namespace megatron_lsh
