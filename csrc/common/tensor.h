// What every op.cpp needs of torch, by the stable ABI: tensors, checks, batch layouts, the current stream.
//
// The public functions in any2point/ops check arguments and word the errors; the checks here only make sure
// that a direct call of torch.ops.any2point.* cannot read or write out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "common/layout.h"

#define A2P_CHECK STD_TORCH_CHECK

namespace any2point {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `rows` with the tensors that its pointers point into.
struct Layout {
  Rows rows;
  int64_t dim;    // D
  Tensor points;  // contiguous
  OptionalTensor lengths, offsets;
};

// points [B, N, D] with lengths [B] or none, or [P, D] with offsets [B + 1].
Layout layout_of(const char* name, const Tensor& points, const OptionalTensor& lengths,
                 const OptionalTensor& offsets);

// `tensor` contiguous, after a check that it is int64, of the given shape and on the device of `like`.
Tensor index_tensor(const char* name, const Tensor& tensor, std::vector<int64_t> shape, const Tensor& like);

void check_same_device(const char* name, const Tensor& tensor, const Tensor& like);

#ifdef ANY2POINT_WITH_CUDA
// torch's current stream on a device, as a cudaStream_t.
void* current_stream(int32_t device);
// Raises with CUDA's own words unless `error` is cudaSuccess.
void check_cuda(const char* op, int error);
#endif

}  // namespace any2point
