#include "group/kernel.h"

#include <algorithm>
#include <atomic>

#include "inverse_list/op.h"

namespace any2point {
namespace {

// features [B, N, C], index [B, R] -> [B, R, C]
Tensor group_cpu_op(const Tensor& features_, const Tensor& index_) {
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

Tensor group_backward_cpu(const Tensor& grad_, const Tensor& index_, int64_t rows) {
  A2P_CHECK(grad_.dim() == 3 && rows >= 0, "grad: expected [B, R, C]");
  const Tensor index = index_tensor("index", index_, {grad_.size(0), grad_.size(1)}, grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  dtype_of("grad", grad);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), rows, grad.size(2)});
  gather_reduce(Reduce::sum, grad, nullptr, 1, inverse_list("index", index, rows), out, nullptr);
  return out;
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("group", TORCH_BOX(&any2point::group_cpu_op));
  m.impl("_group_backward", TORCH_BOX(&any2point::group_backward_cpu));
}
