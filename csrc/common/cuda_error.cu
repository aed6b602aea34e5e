#include "common/cuda_error.h"

namespace any2point {
const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}  // namespace any2point
