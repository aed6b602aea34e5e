#include "common/isa.h"
#include "virtual_project/kernel.h"

namespace any2point {

A2P_DECLARE_ISA(void measure_clouds(const VirtualProject& args, Span* spans, Frame* frames, int64_t begin,
                                    int64_t end);
                void project_centers(const VirtualProject& args, const Span* spans, const Frame* frames,
                                     int64_t* corner, float* weight, int64_t begin, int64_t end))

void virtual_measure_cpu(const VirtualProject& args, Span* spans, Frame* frames, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(measure_clouds, args, spans, frames, begin, end)
}

void virtual_project_cpu(const VirtualProject& args, const Span* spans, const Frame* frames, int64_t* corner,
                         float* weight, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(project_centers, args, spans, frames, corner, weight, begin, end)
}

}  // namespace any2point
