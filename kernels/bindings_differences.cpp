// torch.ops.megatron_lsh, of restoration by differences: for GPUs and the tests' emulator.
#include "bindings.h"

namespace megatron_lsh {
namespace {

std::tuple<Tensor, Tensor> differences(Tensor rows, OptionalTensor order, Tensor cluster, Tensor representatives) {
    rows = checked(rows, "rows", rows.scalar_type(), {-1, -1}, rows);
    representatives = checked(representatives, "representatives", rows.scalar_type(), {-1, rows.size(1)}, rows);
    cluster = integers(cluster, "cluster", -1, rows);
    const int64_t num_rows = cluster.size(0), features = rows.size(1);
    order = checked(order, "order", kLong, {num_rows}, rows);
    STD_TORCH_CHECK(order || rows.size(0) == num_rows, "there must be a cluster for each row");
    Tensor offset = empty(rows, {num_rows, features}, rows.scalar_type()), square = empty(rows, {num_rows}, ScalarType::Float);
    const DifferencesArgs args{data(rows),   data<int64_t>(order), data<int64_t>(cluster), data(representatives),
                               data(offset), data<float>(square),  num_rows,               features,
                               dtype_of(rows)};
    if (num_rows) LSH_RUN(differences, rows, args);
    return {offset, square};
}

Tensor place(Tensor source, Tensor starts, Tensor widths, OptionalTensor mean, int64_t places) {
    source = checked(source, "source", source.scalar_type(), {-1, -1}, source);
    widths = integers(widths, "widths", -1, source);
    const int64_t groups = widths.size(0), features = source.size(1);
    starts = integers(starts, "starts", groups, source);
    mean = checked(mean, "mean", source.scalar_type(), {groups, features}, source);
    Tensor out = empty(source, {groups, places, features}, source.scalar_type());
    const PlaceArgs args{data(source), data<int64_t>(starts), data<int64_t>(widths), data(mean), data(out),
                         groups,       places,                features,              dtype_of(source)};
    if (groups && places && features) LSH_RUN(place, source, args);
    return out;
}

// A square matrix of fp32 for each group.
Tensor squares(const Tensor& t, const char* name, const Tensor& home) {
    return checked(t, name, ScalarType::Float, {-1, -1, t.size(1)}, home);
}

std::tuple<Tensor, Tensor, Tensor> fit(Tensor products, Tensor widths, double ridge, double width) {
    products = squares(products, "products", products);
    const int64_t groups = products.size(0), places = products.size(1);
    widths = integers(widths, "widths", groups, products);
    Tensor scale = empty(products, {groups}, ScalarType::Float), among = empty(products, {groups, places, places}, ScalarType::Float);
    Tensor system = empty(products, {groups, places, places}, ScalarType::Float);
    const FitArgs args{data<float>(products), data<int64_t>(widths), data<float>(scale), data<float>(among), data<float>(system),
                       groups,                places,                float(ridge),       float(width)};
    if (groups && places) LSH_RUN(fit, products, args);
    return {scale, among, system};
}

Tensor half_inverse(Tensor matrices) {
    matrices = squares(matrices, "matrices", matrices);
    const int64_t groups = matrices.size(0), size = matrices.size(1);
    STD_TORCH_CHECK(size <= kMostHalf, "matrices of ", size, " rows are taken by halves; at most ", kMostHalf);
    Tensor out = empty(matrices, {groups, size, size}, ScalarType::Float);
    const HalfInverseArgs args{data<float>(matrices), data<float>(out), groups, size};
    if (groups && size) LSH_RUN(half_inverse, matrices, args);
    return out;
}

std::tuple<Tensor, Tensor> split(Tensor inverse, Tensor widths, ScalarType dtype) {
    inverse = squares(inverse, "inverse", inverse);
    const int64_t groups = inverse.size(0), places = inverse.size(1);
    widths = integers(widths, "widths", groups, inverse);
    Tensor forward = empty(inverse, {groups, 3 * places, places}, dtype), backward = empty(inverse, {groups, 2 * places, places}, dtype);
    const SplitArgs args{data<float>(inverse), data<int64_t>(widths), data(forward), data(backward),
                         groups,               places,                dtype_of(forward)};
    if (groups && places) LSH_RUN(split, inverse, args);
    return {forward, backward};
}

ChangesArgs changes_args(Tensor& products, Tensor& square, Tensor& slot, Tensor& moves, Tensor& among, Tensor& scale) {
    products = checked(products, "products", products.scalar_type(), {-1, -1}, products);
    const int64_t num_rows = products.size(0), places = products.size(1);
    square = checked(square, "square", ScalarType::Float, {num_rows}, products);
    slot = integers(slot, "slot", num_rows, products);
    moves = checked(moves, "moves", ScalarType::Bool, {num_rows}, products);
    among = checked(among, "among", ScalarType::Float, {-1, places, places}, products);
    scale = checked(scale, "scale", ScalarType::Float, {among.size(0)}, products);
    return {data(products),     data<float>(square), data<int64_t>(slot), data<bool>(moves), data<float>(among),
            data<float>(scale), nullptr,             num_rows,            places,            dtype_of(products)};
}

Tensor changes(Tensor products, Tensor square, Tensor slot, Tensor moves, Tensor among, Tensor scale) {
    ChangesArgs args = changes_args(products, square, slot, moves, among, scale);
    Tensor out = empty(products, {args.num_rows, 3 * args.places}, products.scalar_type());
    args.out = data(out);
    if (args.num_rows) LSH_RUN(changes, products, args);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> changes_backward(Tensor grad, Tensor products, Tensor square, Tensor slot,
                                                                    Tensor moves, Tensor among, Tensor scale) {
    const ChangesArgs of = changes_args(products, square, slot, moves, among, scale);
    grad = checked(grad, "grad", products.scalar_type(), {of.num_rows, of.places}, products);
    Tensor moving = empty(grad, {of.num_rows, of.places}, grad.scalar_type());
    Tensor difference = empty(grad, {of.num_rows, of.places}, grad.scalar_type());
    Tensor around = empty(grad, {of.num_rows, of.places}, grad.scalar_type());
    Tensor to_own = empty(grad, {of.num_rows, of.places}, grad.scalar_type());
    Tensor pull = empty(grad, {of.num_rows}, ScalarType::Float);
    const ChangesBackwardArgs args{of,           data(grad),   data(moving),     data(difference),
                                   data(around), data(to_own), data<float>(pull)};
    if (of.num_rows) LSH_RUN(changes_backward, products, args);
    return {moving, difference, around, to_own, pull};
}

Tensor pairs(Tensor by_own, Tensor difference, Tensor by_inverse, Tensor among, Tensor scale, Tensor starts, Tensor widths) {
    among = squares(among, "among", among);
    const int64_t groups = among.size(0), places = among.size(1);
    by_own = checked(by_own, "by_own", by_own.scalar_type(), {-1, places}, among);
    difference = checked(difference, "difference", by_own.scalar_type(), {by_own.size(0), places}, among);
    by_inverse = checked(by_inverse, "by_inverse", by_own.scalar_type(), {groups, places, places}, among);
    scale = checked(scale, "scale", ScalarType::Float, {groups}, among);
    starts = integers(starts, "starts", groups, among);
    widths = integers(widths, "widths", groups, among);
    Tensor out = empty(by_own, {groups, places, places}, by_own.scalar_type());
    const PairsArgs args{data(by_own),          data(difference),      data(by_inverse), data<float>(among), data<float>(scale),
                         data<int64_t>(starts), data<int64_t>(widths), data(out),        groups,             places,
                         dtype_of(by_own)};
    if (groups && places) LSH_RUN(pairs, among, args);
    return out;
}

Tensor less(Tensor x, Tensor weight, Tensor offset, OptionalTensor order) {
    x = checked(x, "x", x.scalar_type(), {-1, -1}, x);
    const int64_t num_rows = x.size(0), features = x.size(1);
    weight = checked(weight, "weight", ScalarType::Float, {num_rows}, x);
    offset = checked(offset, "offset", x.scalar_type(), {num_rows, features}, x);
    order = checked(order, "order", kLong, {num_rows}, x);
    Tensor out = empty(x, {num_rows, features}, x.scalar_type());
    const LessArgs args{data(x), data<float>(weight), data(offset), data<int64_t>(order), data(out), num_rows, features, dtype_of(x)};
    if (num_rows && features) LSH_RUN(less, x, args);
    return out;
}

void register_ops(torch::stable::detail::StableLibrary& m) {
    m.impl("differences", TORCH_BOX(&differences));
    m.impl("place", TORCH_BOX(&place));
    m.impl("fit", TORCH_BOX(&fit));
    m.impl("half_inverse", TORCH_BOX(&half_inverse));
    m.impl("split", TORCH_BOX(&split));
    m.impl("changes", TORCH_BOX(&changes));
    m.impl("changes_backward", TORCH_BOX(&changes_backward));
    m.impl("pairs", TORCH_BOX(&pairs));
    m.impl("less", TORCH_BOX(&less));
}

}  // namespace

#if defined(LSH_ON_GPU)
STABLE_TORCH_LIBRARY_IMPL(megatron_lsh, CUDA, m) { register_ops(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(megatron_lsh_emulated, CPU, m) { register_ops(m); }
#endif

}  // namespace megatron_lsh
