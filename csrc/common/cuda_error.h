// CUDA's words for an error code, without CUDA headers.
#pragma once

namespace any2point {
const char* cuda_error_string(int error);
}  // namespace any2point
