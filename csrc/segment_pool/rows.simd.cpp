// The gradient of segment_pool on the CPU: plain loops, vectorised for each instruction set.
#include "segment_pool/kernel.h"

namespace any2point {
namespace A2P_ISA {

void segment_pool_backward_rows(const SegmentPoolBackward& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = args.channels;
    for (int64_t r = begin; r < end; r++) {
      T* __restrict__ out = static_cast<T*>(args.out) + r * channels;
      const int64_t segment = args.segment[r];
      if (segment < 0 || segment >= args.segments) {
        for (int64_t c = 0; c < channels; c++) out[c] = T{};
        continue;
      }
      const T* __restrict__ grad = static_cast<const T*>(args.grad) + segment * channels;
      if (args.reduce == Reduce::max) {
        const int64_t* argmax = args.saved + segment * channels;
        for (int64_t c = 0; c < channels; c++) out[c] = argmax[c] == r ? grad[c] : T{};
      } else if (args.reduce == Reduce::mean) {
        const auto count = static_cast<Accumulator<T>>(args.saved[segment]);
        for (int64_t c = 0; c < channels; c++) narrow(widen(grad[c]) / count, out + c);
      } else {
        for (int64_t c = 0; c < channels; c++) out[c] = grad[c];
      }
    }
  });
}

}  // namespace A2P_ISA
}  // namespace any2point
