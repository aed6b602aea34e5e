#include "common/radix_sort.h"

#include <cub/device/device_radix_sort.cuh>
#include <utility>

namespace any2point {

size_t radix_sort_scratch(int64_t n) {
  cub::DoubleBuffer<uint64_t> keys(nullptr, nullptr);
  cub::DoubleBuffer<uint32_t> values(nullptr, nullptr);
  size_t bytes = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, values, static_cast<uint32_t>(n));
  return bytes;
}

int radix_sort(SortBuffers* buffers, int64_t n, int begin, int end, void* scratch, size_t scratch_bytes,
               void* stream) {
  if (n <= 1 || end <= begin) return 0;
  cub::DoubleBuffer<uint64_t> keys(buffers->keys[0], buffers->keys[1]);
  cub::DoubleBuffer<uint32_t> values(buffers->values[0], buffers->values[1]);
  const cudaError_t error =
      cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, keys, values, static_cast<uint32_t>(n), begin,
                                      end, static_cast<cudaStream_t>(stream));
  if (keys.selector) std::swap(buffers->keys[0], buffers->keys[1]);
  if (values.selector) std::swap(buffers->values[0], buffers->values[1]);
  return error;
}

}  // namespace any2point
