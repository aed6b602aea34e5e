#include "local_aggregate/kernel.h"

#include "common/isa.h"

namespace any2point {

A2P_DECLARE_ISA(void pack_panels(const float* weight, const float* bias, int64_t out, int64_t in,
                                 float* packed, float* packed_bias);
                void aggregate_groups(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end))

// Of the widest instruction set, so that a layer takes the same room on all of them.
int64_t packed_columns(int64_t out) { return (out + 15) / 16 * 16; }

void pack_linear(const float* weight, const float* bias, int64_t out, int64_t in, float* packed,
                 float* packed_bias){
    A2P_DISPATCH_ISA(pack_panels, weight, bias, out, in, packed, packed_bias)}

// Rows are padded to the six of a register block, and columns to lanes.
int64_t local_aggregate_scratch(const LocalAggregate& args) {
  const int64_t rows = (args.from.neighbors + 5) / 6 * 6;
  return rows * (packed_columns(args.from.width) + packed_columns(args.hidden) + 3);
}

void local_aggregate_cpu(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(aggregate_groups, args, scratch, begin, end)
}

}  // namespace any2point
