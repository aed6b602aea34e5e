// Inverse lists for the ops that use them: allocation and choice of device around kernel.h.
#pragma once

#include "common/tensor.h"
#include "inverse_list/kernel.h"

namespace any2point {

#ifdef ANY2POINT_WITH_CUDA
// The device of a tensor made current, and torch's stream on it.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit OnDevice(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
};
// Workspace from torch; at least one byte, so that its pointer is not null.
Tensor scratch(const Tensor& like, int64_t bytes);
#define A2P_CUDA(function) function
#else
#define A2P_CUDA(function) nullptr
#endif

struct InverseList {
  Tensor start, order;
  int64_t rows;  // N
  bool wide;     // int64, else uint32 in int32 tensors
};

// Of index [B, R], contiguous int64, for rows 0..N-1. On the CPU a value outside [-1, N) is an error that
// speaks of `name`; on CUDA it is left out.
InverseList inverse_list(const char* name, const Tensor& index, int64_t rows);

// kernel.h's GatherReduce over contiguous tensors; `weight` may be null. per_source is `neighbours`; `saved`
// (or null) is the argmax of max, the count of mean.
void gather_reduce(Reduce reduce, const Tensor& source, const Tensor* weight, int64_t neighbours,
                   const InverseList& list, const Tensor& out, const Tensor* saved);

Dtype dtype_of(const char* name, const Tensor& tensor);
// float64 for float64, else float32.
ScalarType accumulator_of(const Tensor& tensor);
int64_t element_size(const Tensor& tensor);

// Raises in the words that any2point.ops turns into a ValueError; `bad` is a position in `index`.
void refuse_index(const char* name, const int64_t* index, int64_t bad, int64_t rows);

}  // namespace any2point
