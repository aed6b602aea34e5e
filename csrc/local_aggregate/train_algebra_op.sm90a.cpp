#include "local_aggregate/train_algebra.h"

#include <tuple>

#include "local_aggregate/hopper_op.h"

namespace any2point {
namespace {

constexpr ScalarType kSingle = ScalarType::Float, kDouble = ScalarType::Double;

const float* floats(const char* name, const Tensor& tensor, const Tensor& like, std::vector<int64_t> shape) {
  return static_cast<const float*>(hopper_data(name, tensor, kSingle, like, shape));
}
const double* doubles(const char* name, const Tensor& tensor, const Tensor& like,
                      std::vector<int64_t> shape) {
  return static_cast<const double*>(hopper_data(name, tensor, kDouble, like, shape));
}
template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}
void check_hidden(int64_t hidden, int64_t width) {
  A2P_CHECK(hopper_has(width, hidden, width == 192 ? 2 : 1), "units: expected other sizes, got [", hidden,
            ", ", width, "]");
}

std::tuple<Tensor, Tensor, Tensor> in_statistics_op(const Tensor& mean, const Tensor& spread,
                                                    const Tensor& count, const Tensor& weight,
                                                    const Tensor& bias, double eps) {
  A2P_CHECK(mean.dim() == 2 && mean.size(1) % 32 == 0, "mean: expected [parts, H] with H a multiple of 32");
  const int64_t parts = mean.size(0), hidden = mean.size(1);
  Tensor to_mean = empty(mean, {hidden}, kDouble), to_deviation = empty(mean, {hidden}, kDouble);
  Tensor single = empty(mean, {4, hidden}, kSingle);
  const InStatistics args{floats("mean", mean, mean, {parts, hidden}),
                          floats("spread", spread, mean, {parts, hidden}),
                          floats("count", count, mean, {parts}),
                          parts,
                          hidden,
                          floats("weight", weight, mean, {hidden}),
                          floats("bias", bias, mean, {hidden}),
                          eps,
                          data<double>(to_mean),
                          data<double>(to_deviation),
                          data<float>(single)};
  const OnDevice device(mean);
  check_cuda("local_aggregate", in_statistics(args, device.stream));
  return {to_mean, to_deviation, single};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> out_statistics_op(
    const Tensor& features, const Tensor& gram, const Tensor& sum, const Tensor& out_weight,
    const Tensor& out_bias, const Tensor& weight, const Tensor& bias, double eps, int64_t rows) {
  A2P_CHECK(out_weight.dim() == 2, "out_weight: expected [C, H]");
  const int64_t width = out_weight.size(0), hidden = out_weight.size(1);
  check_hidden(hidden, width);
  Tensor mean = empty(gram, {width}, kDouble), deviation = empty(gram, {width}, kDouble);
  Tensor hidden_mean = empty(gram, {hidden}, kDouble), hidden_sum = empty(gram, {hidden}, kDouble);
  Tensor hidden_outer = empty(gram, {hidden, hidden}, kDouble), room = empty(gram, {hidden, hidden}, kDouble);
  Tensor single = empty(gram, {2, width}, kSingle), shift = empty(gram, {width}, kSingle);
  Tensor folded = empty(gram, {width, hidden}, features.scalar_type());
  const OutStatistics args{floats("gram", gram, gram, {gram.size(0), hidden, hidden}),
                           floats("sum", sum, gram, {sum.size(0), hidden}),
                           gram.size(0),
                           sum.size(0),
                           rows,
                           hidden,
                           width,
                           floats("out_weight", out_weight, gram, {width, hidden}),
                           floats("out_bias", out_bias, gram, {width}),
                           floats("weight", weight, gram, {width}),
                           floats("bias", bias, gram, {width}),
                           eps,
                           features.scalar_type() == ScalarType::BFloat16,
                           data<double>(room),
                           data<double>(mean),
                           data<double>(deviation),
                           data<double>(hidden_mean),
                           data<double>(hidden_sum),
                           data<double>(hidden_outer),
                           data<float>(single),
                           folded.mutable_data_ptr(),
                           data<float>(shift)};
  const OnDevice device(gram);
  check_cuda("local_aggregate", out_statistics(args, device.stream));
  return {mean, deviation, hidden_mean, hidden_sum, hidden_outer, single, folded, shift};
}

std::tuple<Tensor, Tensor> entries_op(const Tensor& grad, const Tensor& out, const Tensor& out_weight,
                                      const Tensor& out_scale, const Tensor& deviation, bool scaled) {
  A2P_CHECK(grad.dim() == 3 && out_weight.dim() == 2, "grad, out_weight: expected [B, S, C] and [C, H]");
  const std::vector<int64_t> shape{grad.size(0), grad.size(1), grad.size(2)};
  const int64_t width = out_weight.size(0), hidden = out_weight.size(1);
  check_hidden(hidden, width);
  Tensor to = empty(grad, shape, kSingle), sizes = empty(grad, {2}, kSingle);
  Tensor largest = empty(grad, {kEntryParts}, kSingle);
  Entries args{};
  args.grad = floats("grad", grad, grad, shape);
  args.out = floats("out", out, grad, shape);
  args.count = grad.numel();
  if (scaled) {
    args.out_weight = floats("out_weight", out_weight, grad, {width, hidden});
    args.out_scale = floats("out_scale", out_scale, grad, {width});
    args.deviation = doubles("deviation", deviation, grad, {width});
  }
  args.hidden = hidden;
  args.width = width;
  args.largest = data<float>(largest);
  args.entries = data<float>(to);
  args.sizes = data<float>(sizes);
  const OnDevice device(grad);
  check_cuda("local_aggregate", entries(args, device.stream));
  return {to, sizes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pull_op(const Tensor& total, const Tensor& normed,
                                                   const Tensor& outer, const Tensor& out_weight,
                                                   const Tensor& out_scale, const Tensor& deviation,
                                                   const Tensor& hidden_mean, const Tensor& hidden_sum,
                                                   const Tensor& hidden_outer, int64_t rows,
                                                   bool transposed) {
  A2P_CHECK(out_weight.dim() == 2, "out_weight: expected [C, H]");
  const int64_t width = out_weight.size(0), hidden = out_weight.size(1);
  check_hidden(hidden, width);
  Tensor out_grad = empty(total, {width, hidden}, kSingle), q = empty(total, {hidden, hidden}, kSingle);
  Tensor constant = empty(total, {hidden}, kSingle);
  Tensor carried =
      transposed ? empty(total, {hidden, width}, kSingle) : empty(total, {width, hidden}, kSingle);
  const Pull args{floats("total", total, total, {1, width}),
                  floats("normed", normed, total, {1, width}),
                  floats("outer", outer, total, {1, width, hidden}),
                  floats("out_weight", out_weight, total, {width, hidden}),
                  floats("out_scale", out_scale, total, {width}),
                  doubles("deviation", deviation, total, {width}),
                  doubles("hidden_mean", hidden_mean, total, {hidden}),
                  doubles("hidden_sum", hidden_sum, total, {hidden}),
                  doubles("hidden_outer", hidden_outer, total, {hidden, hidden}),
                  rows,
                  hidden,
                  width,
                  transposed,
                  data<float>(out_grad),
                  data<float>(q),
                  data<float>(constant),
                  data<float>(carried)};
  const OnDevice device(total);
  check_cuda("local_aggregate", pull(args, device.stream));
  return {out_grad, q, constant, carried};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_local_aggregate_in_statistics", TORCH_BOX(&any2point::in_statistics_op));
  m.impl("_local_aggregate_out_statistics", TORCH_BOX(&any2point::out_statistics_op));
  m.impl("_local_aggregate_entries", TORCH_BOX(&any2point::entries_op));
  m.impl("_local_aggregate_pull", TORCH_BOX(&any2point::pull_op));
}
