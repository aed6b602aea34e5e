#include "common/isa.h"
#include "segment_pool/kernel.h"

namespace any2point {

A2P_DECLARE_ISA(void segment_pool_backward_rows(const SegmentPoolBackward& args, int64_t begin, int64_t end))

void segment_pool_backward_cpu(const SegmentPoolBackward& args, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(segment_pool_backward_rows, args, begin, end)
}

}  // namespace any2point
