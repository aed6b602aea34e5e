#include "segment_pool/kernel.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "inverse_list/op.h"

namespace any2point {
namespace {

Reduce reduce_of(const std::string& name) {
  A2P_CHECK(name == "sum" || name == "mean" || name == "max", "reduce: expected mean, max or sum, got ",
            name);
  return name == "sum" ? Reduce::sum : name == "mean" ? Reduce::mean : Reduce::max;
}

// The list that the caller has (of any length; read with clamps), or a new one.
InverseList list_of(const Tensor& segment, int64_t segments, const OptionalTensor& order,
                    const OptionalTensor& start) {
  A2P_CHECK(order.has_value() == start.has_value(), "order, start: expected both or neither");
  if (!order) return inverse_list("segment", torch::stable::unsqueeze(segment, 0), segments);
  A2P_CHECK(start->dim() == 1 && start->size(0) > segments, "start: expected at least [num_segments + 1]");
  return {index_tensor("start", *start, {start->size(0)}, segment),
          index_tensor("order", *order, {segment.size(0)}, segment), segments, true};
}

// features [R, C], segment [R] -> pooled [S, C], and what the gradient needs: count [S] (mean),
// argmax [S, C] (max), nothing (sum).
std::tuple<Tensor, Tensor> segment_pool(const Tensor& features_, const Tensor& segment_, int64_t segments,
                                        std::string reduce_name, OptionalTensor order, OptionalTensor start) {
  const Reduce reduce = reduce_of(reduce_name);
  A2P_CHECK(features_.dim() == 2 && segments >= 0, "features: expected [R, C]");
  const Tensor features = torch::stable::contiguous(features_);
  const int64_t channels = features.size(1);
  const Tensor segment = index_tensor("segment", segment_, {features.size(0)}, features);
  const InverseList list = list_of(segment, segments, order, start);
  Tensor out = torch::stable::new_empty(features, {segments, channels});
  std::vector<int64_t> shape{segments};
  if (reduce == Reduce::max) shape.push_back(channels);
  if (reduce == Reduce::sum) shape = {0};
  Tensor saved = torch::stable::new_empty(segment, shape);
  if (out.numel() == 0) torch::stable::zero_(saved);
  gather_reduce(reduce, features, nullptr, 1, list, out, reduce == Reduce::sum ? nullptr : &saved);
  return {out, saved};
}

Tensor segment_pool_backward(const Tensor& grad_, const Tensor& segment_, const Tensor& saved_,
                             std::string reduce_name) {
  SegmentPoolBackward args{};
  args.reduce = reduce_of(reduce_name);
  A2P_CHECK(grad_.dim() == 2 && segment_.dim() == 1, "grad, segment: expected [S, C] and [R]");
  const Tensor grad = torch::stable::contiguous(grad_);
  const int64_t entries = segment_.size(0);
  const Tensor segment = index_tensor("segment", segment_, {entries}, grad);
  args.dtype = dtype_of("grad", grad);
  args.segments = grad.size(0);
  args.channels = grad.size(1);
  Tensor saved = saved_;
  if (args.reduce == Reduce::max) saved = index_tensor("saved", saved_, {args.segments, args.channels}, grad);
  if (args.reduce == Reduce::mean) saved = index_tensor("saved", saved_, {args.segments}, grad);
  Tensor out = torch::stable::new_empty(grad, {entries, args.channels});
  args.grad = grad.const_data_ptr();
  args.segment = segment.const_data_ptr<int64_t>();
  args.saved = saved.const_data_ptr<int64_t>();
  args.out = out.mutable_data_ptr();
#ifdef ANY2POINT_WITH_CUDA
  if (grad.is_cuda()) {
    const OnDevice device(grad);
    check_cuda("segment_pool", segment_pool_backward_cuda(args, entries, device.stream));
    return out;
  }
#endif
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.channels));
  torch::stable::parallel_for(0, entries, grain,
                              [&](int64_t lo, int64_t hi) { segment_pool_backward_cpu(args, lo, hi); });
  return out;
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("segment_pool", TORCH_BOX(&any2point::segment_pool));
  m.impl("_segment_pool_backward", TORCH_BOX(&any2point::segment_pool_backward));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("segment_pool", TORCH_BOX(&any2point::segment_pool));
  m.impl("_segment_pool_backward", TORCH_BOX(&any2point::segment_pool_backward));
}
#endif
