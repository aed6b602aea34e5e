#include "interpolate/kernel.h"

#include "common/isa.h"

namespace any2point {

A2P_DECLARE_ISA(int64_t interpolate_rows(const Interpolate& args, int64_t begin, int64_t end);
                int64_t weight_grad_rows(const Interpolate& args, int64_t begin, int64_t end))

int64_t interpolate_cpu(const Interpolate& args, int64_t begin,
                        int64_t end){A2P_DISPATCH_ISA(interpolate_rows, args, begin, end)}

int64_t interpolate_weight_grad_cpu(const Interpolate& args, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(weight_grad_rows, args, begin, end)
}

}  // namespace any2point
