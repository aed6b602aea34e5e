#include <tuple>

#include "inverse_list/op.h"
#include "local_aggregate/hopper_op.h"
#include "local_aggregate/hopper_train.h"

namespace any2point {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
constexpr ScalarType kSingle = ScalarType::Float;

const float* floats(const char* name, const Tensor& tensor, const Tensor& like, std::vector<int64_t> shape) {
  return static_cast<const float*>(hopper_data(name, tensor, kSingle, like, shape));
}

// Units that are done, five tensors each, into `to`; returns how many.
int done_of(const std::vector<Tensor>& done, const HopperFrom& from, int64_t hidden, int most,
            HopperDone* to) {
  const int units = static_cast<int>(done.size() / 5);
  A2P_CHECK(done.size() % 5 == 0 && units <= most, "done: expected five tensors each, of at most ", most,
            " units");
  for (int u = 0; u < units; u++) {
    const Tensor* unit = &done[5 * u];
    to[u] = {hopper_aligned("before", unit[0], from.features, {from.groups * from.neighbors, hidden}),
             floats("scale", unit[1], from.features, {hidden}),
             floats("shift", unit[2], from.features, {hidden}),
             hopper_aligned("done", unit[3], from.features, {from.width, hidden}),
             floats("done", unit[4], from.features, {from.width})};
  }
  return units;
}

void check_sizes(int64_t width, int64_t hidden, int64_t units) {
  A2P_CHECK(hopper_has(width, hidden, width == 192 ? 2 : 1) && units <= (width == 192 ? 2 : 1),
            "done: expected other sizes, got [", hidden, ", ", width, "] and ", units, " units");
}

Tensor like(const Tensor& tensor, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(tensor, shape, dtype);
}
float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Four project(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
             const OptionalTensor& divisor, const Tensor& wavelength, double beta, bool guard,
             std::vector<Tensor> done, const Tensor& weight, const Tensor& bias, bool statistics,
             const OptionalTensor& to) {
  const HopperFrom from = hopper_from(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t hidden = weight.size(0);
  check_sizes(from.width, hidden, static_cast<int64_t>(done.size()) / 5 + 1);
  HopperProject args{};
  args.rows = from.args;
  args.units = done_of(done, from, hidden, kHopperUnits - 1, args.done);
  args.weight = hopper_aligned("weight", weight, features, {hidden, from.width});
  args.bias = floats("bias", bias, features, {hidden});
  const OnDevice device(features);
  const int processors = hopper_processors();
  const int64_t parts = statistics ? hopper_train_parts(from.groups, from.neighbors, processors) : 0;
  const std::vector<int64_t> shape{to ? 0 : from.groups * from.neighbors, hidden};
  Tensor before = like(features, shape, features.scalar_type());
  Tensor mean = like(features, {parts, hidden}, kSingle), spread = like(features, {parts, hidden}, kSingle);
  Tensor count = like(features, {parts}, kSingle);
  args.before = before.mutable_data_ptr();
  if (to) {
    hopper_aligned("to", *to, features, {from.groups * from.neighbors, hidden});
    args.before = to->mutable_data_ptr();
  }
  args.mean = statistics ? data(mean) : nullptr;
  args.spread = data(spread);
  args.count = data(count);
  Tensor room = scratch(features, hopper_train_scratch(from.width, from.groups, from.neighbors, processors));
  check_cuda("local_aggregate",
             hopper_project(args, from.width, hidden, processors, room.mutable_data_ptr(), device.stream));
  return {before, mean, spread, count};
}

Two gram(const Tensor& before, const Tensor& scale, const Tensor& shift, int64_t) {
  A2P_CHECK(before.dim() == 2, "before: expected [M, H]");
  const int64_t rows = before.size(0), hidden = before.size(1);
  A2P_CHECK(hidden == 96 || hidden == 192 || hidden == 32, "before: expected 32, 96 or 192 columns");
  A2P_CHECK(before.scalar_type() == ScalarType::Half || before.scalar_type() == ScalarType::BFloat16,
            "before: expected float16 or bfloat16");
  HopperGram args{};
  args.before = hopper_aligned("before", before, before, {rows, hidden});
  args.scale = floats("scale", scale, before, {hidden});
  args.shift = floats("shift", shift, before, {hidden});
  args.rows = rows;
  args.bfloat16 = before.scalar_type() == ScalarType::BFloat16;
  const OnDevice device(before);
  const int processors = hopper_processors();
  const HopperGramParts parts = hopper_gram_parts(rows, hidden, processors);
  Tensor products = like(before, {parts.gram, hidden, hidden}, kSingle);
  Tensor sum = like(before, {parts.sum, hidden}, kSingle);
  args.gram = data(products);
  args.sum = data(sum);
  check_cuda("local_aggregate", hopper_gram(args, hidden, processors, device.stream));
  return {products, sum};
}

Two maximum(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
            const OptionalTensor& divisor, const Tensor& wavelength, double beta, bool guard,
            std::vector<Tensor> done) {
  const HopperFrom from = hopper_from(points, features, center, neighbor, divisor, wavelength, beta, guard);
  A2P_CHECK(!done.empty() && done[0].dim() == 2, "done: expected tensors of at least one unit");
  const int64_t hidden = done[0].size(1);
  check_sizes(from.width, hidden, static_cast<int64_t>(done.size()) / 5);
  A2P_CHECK(from.neighbors < 1 << 16, "neighbor: expected fewer than 65536 neighbours");
  HopperMaximum args{};
  args.rows = from.args;
  args.units = done_of(done, from, hidden, kHopperUnits, args.done);
  A2P_CHECK(args.units == (from.width == 192 ? 2 : 1), "done: expected all units");
  const OnDevice device(features);
  const int processors = hopper_processors();
  const std::vector<int64_t> shape{center.size(0), center.size(1), from.width};
  Tensor out = like(features, shape, kSingle), argmax = like(features, shape, ScalarType::Int);
  args.out = data(out);
  args.argmax = static_cast<int32_t*>(argmax.mutable_data_ptr());
  Tensor room = scratch(features, hopper_train_scratch(from.width, from.groups, from.neighbors, processors));
  check_cuda("local_aggregate",
             hopper_maximum(args, from.width, hidden, processors, room.mutable_data_ptr(), device.stream));
  return {out, argmax};
}

// The index of the inverse list of neighbours, where a missing one is the centre.
Tensor resolved_of(const Tensor& center, const Tensor& neighbor, void* stream) {
  Tensor resolved = like(neighbor, {neighbor.size(0), neighbor.size(1) * neighbor.size(2)}, ScalarType::Long);
  check_cuda("local_aggregate",
             hopper_resolve(center.const_data_ptr<int64_t>(), neighbor.const_data_ptr<int64_t>(),
                            neighbor.size(0) * neighbor.size(1), neighbor.size(2),
                            resolved.mutable_data_ptr<int64_t>(), stream));
  return resolved;
}

std::vector<Tensor> lists_of(const Tensor& center, const Tensor& resolved, int64_t points) {
  const InverseList near = inverse_list("neighbor", resolved, points);
  const InverseList owned = inverse_list("center", center, points);
  return {near.start, near.order, owned.start, owned.order};
}

std::vector<Tensor> point_lists(const Tensor& center_, const Tensor& neighbor_, int64_t points) {
  A2P_CHECK(center_.dim() == 2 && neighbor_.dim() == 3, "center, neighbor: expected [B, S] and [B, S, K]");
  const OnDevice device(center_);
  const int64_t clouds = center_.size(0), centers = center_.size(1), neighbors = neighbor_.size(2);
  const Tensor center = index_tensor("center", center_, {clouds, centers}, center_);
  const Tensor neighbor = index_tensor("neighbor", neighbor_, {clouds, centers, neighbors}, center_);
  return lists_of(center, resolved_of(center, neighbor, device.stream), points);
}

// to = the sums of dense [M, C / 2] as neighbours, of clouds from `first` on of those that have the lists.
void point_sums(const Tensor& dense, std::vector<Tensor> lists, int64_t first, Tensor to) {
  A2P_CHECK(to.dim() == 3 && dense.dim() == 2 && lists.size() == 4, "dense, lists, to: expected other sizes");
  const int64_t clouds = to.size(0), points = to.size(1), half = to.size(2), rows = dense.size(0);
  A2P_CHECK(dense.scalar_type() == ScalarType::Half || dense.scalar_type() == ScalarType::BFloat16,
            "dense: expected float16 or bfloat16");
  A2P_CHECK(clouds > 0 && rows % clouds == 0 && half % 8 == 0, "to: expected [B, N, C / 2]");
  A2P_CHECK(first >= 0 && lists[0].numel() >= (first + clouds) * (points + 1), "lists: expected more clouds");
  HopperPoints args{};
  args.dense = hopper_aligned("dense", dense, dense, {rows, half});
  floats("to", to, dense, {clouds, points, half});
  args.direct = data(to);
  args.near = static_cast<const uint32_t*>(lists[0].const_data_ptr()) + first * (points + 1);
  args.pairs = static_cast<const uint32_t*>(lists[1].const_data_ptr());
  args.first_pair = static_cast<uint32_t>(first * (rows / clouds));
  args.bfloat16 = dense.scalar_type() == ScalarType::BFloat16;
  args.clouds = clouds;
  args.points = points;
  args.width = 2 * half;
  const OnDevice device(dense);
  check_cuda("local_aggregate", hopper_point_sums(args, device.stream));
}

Tensor points_grad(const Tensor& dy1, const OptionalTensor& grad, const OptionalTensor& argmax,
                   std::vector<Tensor> dense, const Tensor& center_, const Tensor& neighbor_,
                   const Tensor& weight, const OptionalTensor& factor, int64_t points, bool single,
                   std::vector<Tensor> lists) {
  A2P_CHECK(center_.dim() == 2 && neighbor_.dim() == 3, "center, neighbor: expected [B, S] and [B, S, K]");
  A2P_CHECK(dense.empty() || dense.size() == 2, "dense: expected rows and their sums");
  const int64_t clouds = center_.size(0), centers = center_.size(1), neighbors = neighbor_.size(2);
  const int64_t rows = clouds * centers * neighbors, hidden = dy1.size(1);
  const Tensor center = index_tensor("center", center_, {clouds, centers}, dy1);
  const Tensor neighbor = index_tensor("neighbor", neighbor_, {clouds, centers, neighbors}, dy1);
  A2P_CHECK(grad.has_value() == argmax.has_value() && !(grad && !dense.empty()),
            "dense: expected it, or grad and argmax, or none of them");
  A2P_CHECK(weight.dim() == 2 && hidden == weight.size(0), "weight: expected [H, C]");
  const int64_t width = weight.size(1);
  check_sizes(width, hidden, 1);
  A2P_CHECK(dy1.scalar_type() == ScalarType::Half || dy1.scalar_type() == ScalarType::BFloat16,
            "dy1: expected float16 or bfloat16");
  HopperPoints args{};
  args.dy1 = hopper_aligned("dy1", dy1, dy1, {rows, hidden});
  args.bfloat16 = dy1.scalar_type() == ScalarType::BFloat16;
  const bool summed = !dense.empty() && dense[0].scalar_type() == kSingle;
  if (!dense.empty()) {
    if (!summed) args.dense = hopper_aligned("dense", dense[0], dy1, {rows, width / 2});
    args.by_center = floats("dense", dense[1], dy1, {clouds * centers, width / 2});
  } else if (grad) {
    args.grad = floats("grad", *grad, dy1, {clouds, centers, width});
    args.argmax = static_cast<const int32_t*>(
        hopper_data("argmax", *argmax, ScalarType::Int, dy1, {clouds, centers, width}));
  }
  const OnDevice device(dy1);
  std::optional<Tensor> resolved;
  if (lists.empty()) {
    resolved = resolved_of(center, neighbor, device.stream);
    args.neighbor = resolved->const_data_ptr<int64_t>();
    lists = lists_of(center, *resolved, points);
  }
  A2P_CHECK(lists.size() == 4 && (resolved || !grad), "lists: expected four, and no entries");
  args.near = static_cast<const uint32_t*>(lists[0].const_data_ptr());
  args.pairs = static_cast<const uint32_t*>(lists[1].const_data_ptr());
  args.middle = static_cast<const uint32_t*>(lists[2].const_data_ptr());
  args.owned = static_cast<const uint32_t*>(lists[3].const_data_ptr());
  args.clouds = clouds;
  args.points = points;
  args.centers = centers;
  args.neighbors = neighbors;
  args.hidden = hidden;
  args.width = width;
  args.single = single;
  Tensor groups = like(dy1, {clouds * centers, hidden}, kSingle);
  Tensor by_neighbor = like(dy1, {clouds, points, hidden}, kSingle);
  Tensor direct = summed ? dense[0] : like(dy1, {clouds, points, width / 2}, kSingle);
  Tensor features = like(dy1, {clouds, points, width / 2}, single ? kSingle : dy1.scalar_type());
  args.groups = data(groups);
  args.by_neighbor = data(by_neighbor);
  floats("dense", direct, dy1, {clouds, points, width / 2});
  args.direct = data(direct);
  args.features = features.mutable_data_ptr();
  args.weight = floats("weight", weight, dy1, {hidden, width});
  if (factor) args.factor = floats("factor", *factor, dy1, {});
  check_cuda("local_aggregate", hopper_points(args, device.stream));
  return features;
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_local_aggregate_project", TORCH_BOX(&any2point::project));
  m.impl("_local_aggregate_gram", TORCH_BOX(&any2point::gram));
  m.impl("_local_aggregate_max", TORCH_BOX(&any2point::maximum));
  m.impl("_local_aggregate_point_lists", TORCH_BOX(&any2point::point_lists));
  m.impl("_local_aggregate_point_sums", TORCH_BOX(&any2point::point_sums));
  m.impl("_local_aggregate_points_grad", TORCH_BOX(&any2point::points_grad));
}
