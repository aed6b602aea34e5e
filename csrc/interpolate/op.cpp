#include "interpolate/kernel.h"

#include <algorithm>
#include <atomic>

#include "inverse_list/op.h"

namespace any2point {
namespace {

struct Arguments {
  Tensor features, index, weight, grad;  // contiguous; weight or grad may be missing
  Interpolate kernel;
};

// features [B, N, C], index [B, S, K], and the one of weight [B, S, K] and grad [B, S, C] that is given.
Arguments arguments(const Tensor& features, const Tensor& index, const Tensor* weight, const Tensor* grad) {
  A2P_CHECK(features.dim() == 3 && index.dim() == 3, "features, index: expected [B, N, C] and [B, S, K]");
  Arguments a;
  a.features = torch::stable::contiguous(features);
  const int64_t clouds = features.size(0), queries = index.size(1), neighbours = index.size(2);
  a.index = index_tensor("index", index, {clouds, queries, neighbours}, features);
  a.kernel = {};
  a.kernel.dtype = dtype_of("features", features);
  a.kernel.features = a.features.const_data_ptr();
  a.kernel.index = a.index.const_data_ptr<int64_t>();
  a.kernel.rows = features.size(1);
  a.kernel.queries = queries;
  a.kernel.neighbours = neighbours;
  a.kernel.channels = features.size(2);
  if (weight) {
    check_same_device("weight", *weight, features);
    A2P_CHECK(weight->scalar_type() == accumulator_of(features) && weight->dim() == 3 &&
                  weight->size(0) == clouds && weight->size(1) == queries && weight->size(2) == neighbours,
              "weight: expected [B, S, K] of float32 (float64 with float64 features)");
    a.weight = torch::stable::contiguous(*weight);
    a.kernel.weight = a.weight.const_data_ptr();
  }
  if (grad) {
    check_same_device("grad", *grad, features);
    A2P_CHECK(grad->scalar_type() == features.scalar_type() && grad->dim() == 3 && grad->size(0) == clouds &&
                  grad->size(1) == queries && grad->size(2) == features.size(2),
              "grad: expected [B, S, C] of the features' dtype");
    a.grad = torch::stable::contiguous(*grad);
    a.kernel.grad = a.grad.const_data_ptr();
  }
  return a;
}

using CpuKernel = int64_t (*)(const Interpolate&, int64_t, int64_t);
using CudaKernel = int (*)(const Interpolate&, int64_t, void*);

void run(const Arguments& a, CpuKernel kernel, [[maybe_unused]] CudaKernel cuda_kernel) {
#ifdef ANY2POINT_WITH_CUDA
  if (a.features.is_cuda()) {
    const OnDevice device(a.features);
    check_cuda("interpolate", cuda_kernel(a.kernel, a.features.size(0), device.stream));
    return;
  }
#endif
  std::atomic<int64_t> bad{-1};
  const int64_t work = std::max<int64_t>(1, a.kernel.neighbours * a.kernel.channels);
  torch::stable::parallel_for(0, a.index.size(0) * a.kernel.queries, std::max<int64_t>(1, 16384 / work),
                              [&](int64_t lo, int64_t hi) {
                                const int64_t found = kernel(a.kernel, lo, hi);
                                for (int64_t seen = bad; found >= 0 && (seen < 0 || found < seen);) {
                                  if (bad.compare_exchange_weak(seen, found)) break;
                                }
                              });
  if (bad >= 0) refuse_index("index", a.kernel.index, bad, a.kernel.rows);
}

Tensor interpolate(const Tensor& features, const Tensor& index, const Tensor& weight) {
  Arguments a = arguments(features, index, &weight, nullptr);
  Tensor out = torch::stable::new_empty(a.features, {index.size(0), index.size(1), features.size(2)});
  a.kernel.out = out.mutable_data_ptr();
  run(a, interpolate_cpu, A2P_CUDA(interpolate_cuda));
  return out;
}

Tensor interpolate_weight_grad(const Tensor& grad, const Tensor& features, const Tensor& index) {
  Arguments a = arguments(features, index, nullptr, &grad);
  Tensor out = torch::stable::new_empty(a.features, a.index.sizes(), accumulator_of(features));
  a.kernel.out = out.mutable_data_ptr();
  run(a, interpolate_weight_grad_cpu, A2P_CUDA(interpolate_weight_grad_cuda));
  return out;
}

// grad [B, S, C], index and weight [B, S, K] -> [B, num_rows, C]
Tensor interpolate_features_grad(const Tensor& grad_, const Tensor& index_, const Tensor& weight_,
                                 int64_t rows) {
  A2P_CHECK(grad_.dim() == 3 && index_.dim() == 3 && rows >= 0, "grad, index: expected [B, S, C], [B, S, K]");
  const int64_t clouds = grad_.size(0), queries = grad_.size(1), neighbours = index_.size(2);
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor index = index_tensor("index", index_, {clouds, queries, neighbours}, grad);
  check_same_device("weight", weight_, grad);
  A2P_CHECK(weight_.scalar_type() == accumulator_of(grad) && weight_.numel() == index.numel(),
            "weight: expected [B, S, K] of float32 (float64 with float64 features)");
  const Tensor weight = torch::stable::contiguous(weight_);
  const Tensor flat = torch::stable::view(index, {clouds, queries * neighbours});
  Tensor out = torch::stable::new_empty(grad, {clouds, rows, grad.size(2)});
  gather_reduce(Reduce::sum, grad, &weight, std::max<int64_t>(1, neighbours),
                inverse_list("index", flat, rows), out, nullptr);
  return out;
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("interpolate", TORCH_BOX(&any2point::interpolate));
  m.impl("_interpolate_features_grad", TORCH_BOX(&any2point::interpolate_features_grad));
  m.impl("_interpolate_weight_grad", TORCH_BOX(&any2point::interpolate_weight_grad));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("interpolate", TORCH_BOX(&any2point::interpolate));
  m.impl("_interpolate_features_grad", TORCH_BOX(&any2point::interpolate_features_grad));
  m.impl("_interpolate_weight_grad", TORCH_BOX(&any2point::interpolate_weight_grad));
}
#endif
