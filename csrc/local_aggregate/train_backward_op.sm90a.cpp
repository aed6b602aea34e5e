#include <tuple>

#include "local_aggregate/hopper_op.h"
#include "local_aggregate/train_backward.h"

namespace any2point {
namespace {

constexpr ScalarType kSingle = ScalarType::Float;

const float* floats(const char* name, const Tensor& tensor, const Tensor& like, std::vector<int64_t> shape) {
  const void* data = hopper_data(name, tensor, kSingle, like, std::move(shape));
  A2P_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": expected data aligned to 16 bytes");
  return static_cast<const float*>(data);
}

float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor empty(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, kSingle);
}

BackwardSize size_of(const Tensor& before, int64_t neighbors, int64_t width) {
  A2P_CHECK(before.dim() == 2 && neighbors > 0 && before.size(0) > 0 && before.size(0) % neighbors == 0,
            "before: expected [M, H] with M a multiple of K");
  const ScalarType dtype = before.scalar_type();
  A2P_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "before: expected float16 or bfloat16");
  const int64_t hidden = before.size(1);
  A2P_CHECK(hopper_has(width, hidden, width == 192 ? 2 : 1), "before: expected other sizes, got [", hidden,
            ", ", width, "]");
  // Rows of a group are compared as halves, none of which may be infinite.
  A2P_CHECK(neighbors < 31744 && before.size(0) < int64_t{1} << 31,
            "neighbor: too large, got K = ", neighbors);
  return {
      width, hidden, before.size(0) / neighbors, static_cast<int>(neighbors), dtype == ScalarType::BFloat16,
      0};
}

BackwardHidden hidden_of(const Tensor& before, const Tensor& scale, const Tensor& shift, const Tensor& like,
                         const BackwardSize& size) {
  return {hopper_aligned("before", before, like, {size.groups * size.neighbors, size.hidden}),
          floats("scale", scale, like, {size.hidden}), floats("shift", shift, like, {size.hidden})};
}

BackwardEntries entries_of(const OptionalTensor& grad, const OptionalTensor& argmax, const Tensor& like,
                           const BackwardSize& size) {
  A2P_CHECK(grad && argmax && grad->dim() == 3 && argmax->dim() == 3 &&
                grad->size(0) * grad->size(1) == size.groups,
            "grad, argmax: expected [B, S, C]");
  const std::vector<int64_t> shape{grad->size(0), grad->size(1), size.width};
  return {floats("grad", *grad, like, shape),
          static_cast<const int32_t*>(hopper_data("argmax", *argmax, ScalarType::Int, like, shape))};
}

struct Sums {
  Tensor grad, normed, outer;
  BackwardOutSums to;

  Sums(const Tensor& like, const BackwardSize& size, const Tensor& weight, const Tensor& bias,
       const Tensor& mean, const Tensor& deviation)
      : grad(empty(like, {1, size.width})),
        normed(empty(like, {1, size.width})),
        outer(empty(like, {1, size.width, size.hidden})),
        to{floats("weight", weight, like, {size.width, size.hidden}),
           floats("bias", bias, like, {size.width}),
           floats("mean", mean, like, {size.width}),
           floats("deviation", deviation, like, {size.width}),
           mutable_floats(grad),
           mutable_floats(normed),
           mutable_floats(outer)} {}
};

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Three out_sums(const Tensor& before, const Tensor& scale, const Tensor& shift, const Tensor& grad,
               const Tensor& argmax, int64_t neighbors, const Tensor& weight, const Tensor& bias,
               const Tensor& mean, const Tensor& deviation) {
  const OnDevice device(before);
  BackwardSize size = size_of(before, neighbors, weight.size(0));
  size.processors = hopper_processors();
  const Sums sums(before, size, weight, bias, mean, deviation);
  const BackwardEntrySums args{hidden_of(before, scale, shift, before, size),
                               entries_of(grad, argmax, before, size), sums.to};
  Tensor room = scratch(before, backward_entry_sums_scratch(size));
  check_cuda("local_aggregate", backward_entry_sums(size, args, room.mutable_data_ptr(), device.stream));
  return {sums.grad, sums.normed, sums.outer};
}

// Dense rows come in two halves of channels, and dz may take the place of the second. Without du dz is added
// to what is there. An empty dz: the sums alone. norm: none, or factor, m1 and m2 of dy1, which then takes
// the place of dz, as that may that of y1.
Two hidden_grad(const Tensor& before, const Tensor& scale, const Tensor& shift, const OptionalTensor& grad,
                const OptionalTensor& argmax, std::vector<Tensor> dense, int64_t neighbors, const Tensor& q,
                const Tensor& constant, const Tensor& weight, const Tensor& mean, const Tensor& deviation,
                Tensor dz, std::vector<Tensor> norm) {
  using Given = BackwardGiven;
  const OnDevice device(before);
  A2P_CHECK(weight.dim() == 2, "weight: expected two dimensions");
  A2P_CHECK(dense.empty() || dense.size() == 2, "dense: expected no rows, or two halves of them");
  BackwardSize size = size_of(before, neighbors, weight.size(dense.empty() ? 0 : 1));
  size.processors = hopper_processors();
  const int64_t hidden = size.hidden, rows = before.size(0);
  const Given given = !dense.empty()  ? Given::dense
                      : !norm.empty() ? Given::dy1
                      : grad          ? Given::entries
                                      : Given::added;
  const bool alone = given == Given::entries && dz.numel() == 0;
  if (!alone) hopper_aligned("dz", dz, before, {rows, hidden});
  A2P_CHECK(given == Given::entries || size.width == 192, "grad: expected entries for a single unit");
  A2P_CHECK(norm.size() == (given == Given::dy1 ? 3 : 0), "norm: expected no or three tensors");
  Tensor sum = empty(before, {1, hidden}), normed = empty(before, {1, hidden});
  const std::vector<int64_t> shape =
      dense.empty() ? std::vector<int64_t>{size.width, hidden} : std::vector<int64_t>{hidden, size.width};
  BackwardHiddenGrad args{given,
                          hidden_of(before, scale, shift, before, size),
                          {},
                          nullptr,
                          nullptr,
                          floats("q", q, before, {hidden, hidden}),
                          floats("constant", constant, before, {hidden}),
                          floats("weight", weight, before, shape),
                          floats("mean", mean, before, {hidden}),
                          floats("deviation", deviation, before, {hidden}),
                          alone ? nullptr : dz.mutable_data_ptr(),
                          mutable_floats(sum),
                          mutable_floats(normed),
                          nullptr,
                          nullptr,
                          nullptr};
  const float** const statistics[3] = {&args.factor, &args.m1, &args.m2};
  for (size_t i = 0; i < norm.size(); i++) *statistics[i] = floats("norm", norm[i], before, {hidden});
  if (given == Given::dense) {
    args.near = hopper_aligned("dense", dense[0], before, {rows, size.width / 2});
    args.center = hopper_aligned("dense", dense[1], before, {rows, size.width / 2});
  } else if (given != Given::added) {
    args.entries = entries_of(grad, argmax, before, size);
  }
  Tensor room = scratch(before, backward_hidden_grad_scratch(size, given));
  check_cuda("local_aggregate", backward_hidden_grad(size, args, room.mutable_data_ptr(), device.stream));
  return {sum, normed};
}

// On CUDA: weight_grad [1, H, C], and then, of the unit before, the first half of the channels of du in the
// type of the features, of the second half, which takes the place of dz, the sums of groups, and of both two
// sums and the outer product. The first unit's dy1 takes the place of dz.
std::vector<Tensor> rows_grad(const Tensor& points, const Tensor& features, const Tensor& center,
                              const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                              double beta, bool guard, std::vector<Tensor> done, const Tensor& before,
                              const OptionalTensor& grad, const OptionalTensor& argmax,
                              std::vector<Tensor> dense, Tensor dz, std::vector<Tensor> norm,
                              const Tensor& weight, std::vector<Tensor> below) {
  const OnDevice device(features);
  const HopperFrom from = hopper_from(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t width = from.width;
  BackwardSize size = size_of(before, from.neighbors, width);
  size.processors = hopper_processors();
  A2P_CHECK(size.groups == from.groups && from.clouds * from.args.rows < int64_t{1} << 31,
            "before: expected B * S * K rows");
  A2P_CHECK(norm.size() == 5 && below.size() == (done.empty() ? 0 : 4) && (done.empty() || done.size() == 5),
            "norm, done, below: expected 5, 5 and 4 tensors");
  const int64_t hidden = size.hidden, rows = before.size(0);

  BackwardRows args{};
  args.from = from.args;
  args.before = hopper_aligned("before", before, features, {rows, hidden});
  hopper_aligned("dz", dz, features, {rows, hidden});
  args.dz = dz.mutable_data_ptr();
  const float** const statistics[5] = {&args.mean, &args.deviation, &args.factor, &args.m1, &args.m2};
  for (int i = 0; i < 5; i++) *statistics[i] = floats("norm", norm[i], features, {hidden});
  Tensor weight_grad = empty(features, {1, hidden, width});
  args.weight_grad = mutable_floats(weight_grad);
  Tensor room = scratch(features, backward_rows_scratch(size, !done.empty()));
  if (done.empty()) {
    check_cuda("local_aggregate", backward_rows(size, args, room.mutable_data_ptr(), device.stream));
    return {weight_grad};
  }
  A2P_CHECK(dense.empty(), "dense: expected entries for a unit above another");
  args.entries = entries_of(grad, argmax, features, size);
  args.weight = floats("weight", weight, features, {width, hidden});
  args.below = hidden_of(done[0], done[1], done[2], features, size);
  args.below_weight = floats("done", done[3], features, {width, hidden});
  args.below_bias = floats("done", done[4], features, {width});
  const Sums sums(features, size, below[0], below[1], below[2], below[3]);
  args.sums = sums.to;
  Tensor near = torch::stable::new_empty(features, {rows, width / 2});
  args.near = near.mutable_data_ptr();
  Tensor by_group = empty(features, {size.groups, width / 2});
  args.by_group = mutable_floats(by_group);
  check_cuda("local_aggregate", backward_rows(size, args, room.mutable_data_ptr(), device.stream));
  return {weight_grad, near, by_group, sums.grad, sums.normed, sums.outer};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_local_aggregate_out_sums", TORCH_BOX(&any2point::out_sums));
  m.impl("_local_aggregate_hidden_grad", TORCH_BOX(&any2point::hidden_grad));
  m.impl("_local_aggregate_rows_grad", TORCH_BOX(&any2point::rows_grad));
}
