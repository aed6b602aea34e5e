#include "inverse_list/op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace any2point {

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      A2P_CHECK(false, name, ": expected float16, bfloat16, float32 or float64");
      return Dtype::f32;
  }
}

ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t element_size(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      A2P_CHECK(false, "features: expected a floating, integer or bool dtype");
      return 0;
  }
}

void refuse_index(const char* name, const int64_t* index, int64_t bad, int64_t rows) {
  A2P_CHECK(false, name, ": expected values in -1..", rows - 1, ", got ", index[bad], " at position ", bad);
}

#ifdef ANY2POINT_WITH_CUDA
Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
}

namespace {

InverseList inverse_list_on_cuda(const Tensor& index, int64_t rows) {
  const int64_t clouds = index.size(0), entries = index.size(1);
  A2P_CHECK(clouds * entries < kCudaListLimit, "index: expected fewer than 2^32 entries on CUDA");
  const OnDevice device(index);
  const InverseList list{torch::stable::new_empty(index, {clouds, rows + 1}, ScalarType::Int),
                         torch::stable::new_empty(index, {clouds * entries}, ScalarType::Int), rows, false};
  const InverseListCuda args{index.const_data_ptr<int64_t>(),
                             clouds,
                             entries,
                             rows,
                             static_cast<uint32_t*>(list.start.mutable_data_ptr()),
                             static_cast<uint32_t*>(list.order.mutable_data_ptr())};
  const int64_t bytes = inverse_list_workspace(args);
  const Tensor workspace = scratch(index, bytes);
  check_cuda("inverse_list", inverse_list_cuda(args, workspace.mutable_data_ptr(), bytes, device.stream));
  return list;
}

InverseList narrow_list_on_cuda(const InverseList& list) {
  const int64_t entries = list.order.numel();
  A2P_CHECK(entries < kCudaListLimit, "order: expected fewer than 2^32 entries on CUDA");
  const OnDevice device(list.order);
  const auto narrow = [&](const Tensor& wide, int64_t n, int64_t bound) {
    Tensor out = torch::stable::new_empty(wide, {n}, ScalarType::Int);
    check_cuda("segment_pool",
               narrow_list_cuda(wide.const_data_ptr<int64_t>(), n, bound,
                                static_cast<uint32_t*>(out.mutable_data_ptr()), device.stream));
    return out;
  };
  return {narrow(list.start, list.rows + 1, entries),
          narrow(list.order, entries, std::max<int64_t>(entries - 1, 0)), list.rows, false};
}

}  // namespace
#endif

InverseList inverse_list(const char* name, const Tensor& index, int64_t rows) {
#ifdef ANY2POINT_WITH_CUDA
  if (index.is_cuda()) return inverse_list_on_cuda(index, rows);
#endif
  const int64_t clouds = index.size(0), entries = index.size(1);
  const bool wide = clouds * entries >= std::numeric_limits<uint32_t>::max();
  const ScalarType dtype = wide ? ScalarType::Long : ScalarType::Int;
  InverseList list{torch::stable::new_empty(index, {clouds, rows + 1}, dtype),
                   torch::stable::new_empty(index, {clouds * entries}, dtype), rows, wide};
  const int64_t* values = index.const_data_ptr<int64_t>();
  std::vector<int64_t> bad(clouds, -1);
  torch::stable::parallel_for(0, clouds, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; b++) {
      const auto build = [&](auto type) {
        using List = decltype(type);
        List* start = static_cast<List*>(list.start.mutable_data_ptr()) + b * (rows + 1);
        List* order = static_cast<List*>(list.order.mutable_data_ptr());
        bad[b] = inverse_list_cpu(values + b * entries, entries, rows, b * entries, start, order);
      };
      wide ? build(int64_t{}) : build(uint32_t{});
    }
  });
  for (int64_t b = 0; b < clouds; b++) {
    if (bad[b] >= 0) refuse_index(name, values, b * entries + bad[b], rows);
  }
  return list;
}

void gather_reduce(Reduce reduce, const Tensor& source, const Tensor* weight, int64_t neighbours,
                   const InverseList& given, const Tensor& out, const Tensor* saved) {
  if (out.numel() == 0) return;
  InverseList list = given;
#ifdef ANY2POINT_WITH_CUDA
  if (out.is_cuda() && list.wide) list = narrow_list_on_cuda(list);
#endif
  GatherReduce args{};
  args.dtype = dtype_of("features", source);
  args.reduce = reduce;
  args.source = source.const_data_ptr();
  args.weight = weight ? weight->const_data_ptr() : nullptr;
  args.channels = source.size(source.dim() - 1);
  args.per_source = neighbours;
  args.sources = args.channels ? source.numel() / args.channels : 0;
  args.rows = list.rows;
  args.wide = list.wide;
  args.start = list.start.const_data_ptr();
  args.order = list.order.const_data_ptr();
  args.entries = list.order.numel();
  args.out = out.mutable_data_ptr();
  int64_t* extra = saved ? saved->mutable_data_ptr<int64_t>() : nullptr;
  (reduce == Reduce::max ? args.argmax : args.count) = extra;
#ifdef ANY2POINT_WITH_CUDA
  if (out.is_cuda()) {
    const OnDevice device(out);
    const int64_t rows = out.numel() / args.channels;
    const Tensor workspace = scratch(out, gather_reduce_workspace(args, rows));
    check_cuda("gather_reduce", gather_reduce_cuda(args, rows, workspace.mutable_data_ptr(), device.stream));
    return;
  }
#endif
  const int64_t tiles = column_tiles(args.channels), items = out.numel() / args.channels * tiles;
  const int64_t work = std::max<int64_t>(1, args.entries * args.channels / items);
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 32768 / work),
                              [&](int64_t lo, int64_t hi) { gather_reduce_cpu(args, lo, hi); });
}

}  // namespace any2point
