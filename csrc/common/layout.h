// Where the rows of a cloud lie, for kernels: padded [B, N, D] with optional lengths, or packed [P, D] with
// offsets. Plain pointers, usable on the CPU and in CUDA kernels.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define A2P_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define A2P_HOST_DEVICE inline
#endif

namespace any2point {

struct Rows {
  int64_t clouds;          // B
  int64_t padded;          // N; unused if packed
  int64_t total;           // rows in the tensor: B * N, or P
  const int64_t* lengths;  // [B] or null: all N
  const int64_t* offsets;  // [B + 1] or null: padded

  A2P_HOST_DEVICE bool packed() const { return offsets != nullptr; }
  A2P_HOST_DEVICE int64_t begin(int64_t cloud) const {
    return offsets ? clamp(offsets[cloud], 0, total) : cloud * padded;
  }
  // Clamped, so that wrong lengths or offsets cannot make a kernel leave the tensor.
  A2P_HOST_DEVICE int64_t count(int64_t cloud) const {
    if (offsets) return clamp(offsets[cloud + 1] - begin(cloud), 0, total - begin(cloud));
    return lengths ? clamp(lengths[cloud], 0, padded) : padded;
  }
  // What is added to an index within the cloud to give the index that users see.
  A2P_HOST_DEVICE int64_t index_base(int64_t cloud) const { return offsets ? begin(cloud) : 0; }

 private:
  A2P_HOST_DEVICE static int64_t clamp(int64_t v, int64_t lo, int64_t hi) {
    return v < lo ? lo : v > hi ? hi : v;
  }
};

}  // namespace any2point
