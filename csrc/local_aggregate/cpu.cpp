#include "local_aggregate/kernel.h"

#include "common/isa.h"
#include "local_aggregate/train.h"

namespace any2point {

A2P_DECLARE_ISA(void pack_panels(const float* weight, const float* bias, int64_t out, int64_t in,
                                 float* packed, float* packed_bias);
                void aggregate_groups(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end))

A2P_DECLARE_ISA(void project(const TrainedRows& rows, const PackedLinear& next, int64_t hidden, float* before,
                             float* mean, float* spread, float* scratch, int64_t begin, int64_t end);
                void gram(const TrainedRows& rows, const TrainedUnit& unit, float* sums, float* sum,
                          float* scratch, int64_t begin, int64_t end);
                void maximum(const TrainedRows& rows, float* out, int32_t* argmax, float* scratch,
                             int64_t begin, int64_t end);
                void out_sums(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                              const OutSums& sums, float* scratch, int64_t begin, int64_t end);
                void hidden_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                                 const PackedLinear& q, const float* weight, const PackedLinear& out,
                                 const InNorm& norm, float* dz, float* sum, float* sum_normed, float* scratch,
                                 int64_t begin, int64_t end);
                void rows_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                               const float* dz, const InNorm& norm, const RowsGradOut& to, float* scratch,
                               int64_t begin, int64_t end))

A2P_DECLARE_BF16(void pack_columns(const float* weight, const float* bias, int64_t out, int64_t in,
                                   BFloat16* packed, float* packed_bias);
                 int64_t groups_scratch(const LocalAggregateBf16& args);
                 void aggregate_groups(const LocalAggregateBf16& args, void* scratch, int64_t begin,
                                       int64_t end))

// Of the widest instruction set, so that a layer takes the same room on all of them.
int64_t packed_columns(int64_t out) { return (out + 15) / 16 * 16; }

void pack_linear(const float* weight, const float* bias, int64_t out, int64_t in, float* packed,
                 float* packed_bias){
    A2P_DISPATCH_ISA(pack_panels, weight, bias, out, in, packed, packed_bias)}

// Rows are padded to the six of a register block, and columns to lanes.
int64_t local_aggregate_scratch(const LocalAggregate& args) {
  const int64_t rows = padded6(args.from.neighbors);
  return rows * (packed_columns(args.from.width) + packed_columns(args.hidden) + 3);
}

void local_aggregate_cpu(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(aggregate_groups, args, scratch, begin, end)
}

bool multiplies_bf16() { return isa() >= Isa::avx512bf16; }

void pack_linear_bf16(const float* weight, const float* bias, int64_t out, int64_t in, BFloat16* packed,
                      float* packed_bias){
    A2P_DISPATCH_BF16(pack_columns, weight, bias, out, in, packed, packed_bias)}

int64_t local_aggregate_bf16_scratch(const LocalAggregateBf16& args) {
  A2P_DISPATCH_BF16(groups_scratch, args)
}

void local_aggregate_bf16(const LocalAggregateBf16& args, void* scratch, int64_t begin,
                          int64_t end){A2P_DISPATCH_BF16(aggregate_groups, args, scratch, begin, end)}

int64_t train_scratch(const TrainedRows& rows) {
  const int64_t most = padded6(tile_groups(rows.from.neighbors) * rows.from.neighbors);
  return 2 * most * (train_stride(rows.from.width) + train_stride(rows.hidden)) + 3 * rows.from.neighbors;
}

void train_project(const TrainedRows& rows, const PackedLinear& next, int64_t hidden, float* before,
                   float* mean, float* spread, float* scratch, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(project, rows, next, hidden, before, mean, spread, scratch, begin, end)
}

void train_gram(const TrainedRows& rows, const TrainedUnit& unit, float* sums, float* sum, float* scratch,
                int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(gram, rows, unit, sums, sum, scratch, begin, end)
}

void train_max(const TrainedRows& rows, float* out, int32_t* argmax, float* scratch, int64_t begin,
               int64_t end) {
  A2P_DISPATCH_ISA(maximum, rows, out, argmax, scratch, begin, end)
}

void train_out_sums(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                    const OutSums& sums, float* scratch, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(out_sums, rows, unit, du, sums, scratch, begin, end)
}

void train_hidden_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                       const PackedLinear& q, const float* weight, const PackedLinear& out,
                       const InNorm& norm, float* dz, float* sum, float* sum_normed, float* scratch,
                       int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(hidden_grad, rows, unit, du, q, weight, out, norm, dz, sum, sum_normed, scratch, begin,
                   end)
}

void train_rows_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du, const float* dz,
                     const InNorm& norm, const RowsGradOut& to, float* scratch, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(rows_grad, rows, unit, du, dz, norm, to, scratch, begin, end)
}

}  // namespace any2point
