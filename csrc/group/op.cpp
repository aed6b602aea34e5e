#include "group/kernel.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <string>

#include "inverse_list/op.h"

namespace any2point {
namespace {

#ifdef ANY2POINT_WITH_CUDA
// Eight bytes of NaN; of zero for the other types.
uint64_t nan_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return 0x7e007e007e007e00;
    case ScalarType::BFloat16:
      return 0x7fc07fc07fc07fc0;
    case ScalarType::Float:
      return 0x7fc000007fc00000;
    case ScalarType::Double:
      return 0x7ff8000000000000;
    default:
      return 0;
  }
}
#endif

// features [B, N, C], index [B, R] -> [B, R, C]
Tensor group(const Tensor& features_, const Tensor& index_) {
  A2P_CHECK(features_.dim() == 3 && index_.dim() == 2, "features, index: expected [B, N, C] and [B, R]");
  const Tensor features = torch::stable::contiguous(features_);
  const int64_t clouds = features.size(0), entries = index_.size(1), channels = features.size(2);
  const Tensor index = index_tensor("index", index_, {clouds, entries}, features);
  Tensor out = torch::stable::new_empty(features, {clouds, entries, channels});
  const Group args{features.const_data_ptr(),
                   index.const_data_ptr<int64_t>(),
                   out.mutable_data_ptr(),
                   features.size(1),
                   entries,
                   channels * element_size(features)};
#ifdef ANY2POINT_WITH_CUDA
  if (features.is_cuda()) {
    const OnDevice device(features);
    check_cuda("group", group_cuda(args, clouds, nan_of(features.scalar_type()), device.stream));
    return out;
  }
#endif
  std::atomic<int64_t> bad{-1};
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(args.row_bytes, 16));
  torch::stable::parallel_for(0, index.numel(), grain, [&](int64_t lo, int64_t hi) {
    const int64_t found = group_cpu(args, lo, hi);
    // The lowest, whatever the threads: the message is the same on every run.
    for (int64_t seen = bad; found >= 0 && (seen < 0 || found < seen);) {
      if (bad.compare_exchange_weak(seen, found)) break;
    }
  });
  if (bad >= 0) refuse_index("index", args.index, bad, args.rows);
  return out;
}

Tensor group_backward(const Tensor& grad_, const Tensor& index_, int64_t rows) {
  A2P_CHECK(grad_.dim() == 3 && rows >= 0, "grad: expected [B, R, C]");
  const Tensor index = index_tensor("index", index_, {grad_.size(0), grad_.size(1)}, grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  dtype_of("grad", grad);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), rows, grad.size(2)});
  gather_reduce(Reduce::sum, grad, nullptr, 1, inverse_list("index", index, rows), out, nullptr);
  return out;
}

std::string list_launches(int64_t capability, int64_t processors, int64_t shared, int64_t clouds,
                          int64_t entries, int64_t rows) {
  const ListPlan plan = plan_list(static_cast<int>(capability), processors, shared, clouds, entries, rows);
  const char* names[] = {"sorted", "counted", "cluster"};
  std::ostringstream text;
  text << "{\"kernel\": \"" << names[plan.kernel] << "\", \"parts\": " << plan.parts
       << ", \"each\": " << plan.each << ", \"rows\": " << plan.rows << ", \"shared\": " << plan.shared
       << "}";
  return text.str();
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CompositeExplicitAutograd, m) {
  m.impl("_inverse_list_launches", TORCH_BOX(&any2point::list_launches));
}
STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("group", TORCH_BOX(&any2point::group));
  m.impl("_group_backward", TORCH_BOX(&any2point::group_backward));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("group", TORCH_BOX(&any2point::group));
  m.impl("_group_backward", TORCH_BOX(&any2point::group_backward));
}
#endif
