#include "local_aggregate/op.h"

#include <algorithm>

namespace any2point {

const float* floats(const char* name, const Tensor& tensor, std::vector<int64_t> shape) {
  A2P_CHECK(tensor.scalar_type() == ScalarType::Float && !tensor.is_cuda() && tensor.is_contiguous(), name,
            ": expected a contiguous float32 tensor on the CPU");
  A2P_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(),
            " dimensions");
  for (size_t i = 0; i < shape.size(); i++) {
    A2P_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
              tensor.size(i));
  }
  return static_cast<const float*>(tensor.const_data_ptr());
}

namespace {

const int64_t* rows_below(const char* name, const Tensor& index, int64_t lowest, int64_t rows) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); i++) {
    if (values[i] < lowest || values[i] >= rows) refuse_index(name, values, i, rows);
  }
  return values;
}

}  // namespace

From neighborhoods(const Tensor& points, const Tensor& features, const Tensor& center_,
                   const Tensor& neighbor_, const OptionalTensor& divisor, const Tensor& wavelength,
                   double beta, bool guard, bool low) {
  A2P_CHECK(features.dim() == 3 && center_.dim() == 2 && neighbor_.dim() == 3,
            "features, center, neighbor: expected [B, N, C / 2], [B, S] and [B, S, K]");
  const int64_t clouds = features.size(0), rows = features.size(1), width = 2 * features.size(2);
  const int64_t centers = center_.size(1), neighbors = neighbor_.size(2);
  A2P_CHECK(neighbors > 0, "neighbor: expected [B, S, K] with K > 0");
  From from{{},
            clouds,
            index_tensor("center", center_, {clouds, centers}, features),
            index_tensor("neighbor", neighbor_, {clouds, centers, neighbors}, features),
            {}};
  const float* lengths = floats("wavelength", wavelength, {width / 6});
  from.wavelength.assign(lengths, lengths + width / 6);
  from.wavelength.resize(packed_columns(width / 6), 1.0f);
  Neighborhoods& args = from.rows;
  args.points = floats("points", points, {clouds, rows, 3});
  args.features = low ? nullptr : floats("features", features, {clouds, rows, width / 2});
  args.center = rows_below("center", from.center, -1, rows);
  args.neighbor = rows_below("neighbor", from.neighbor, INT64_MIN, rows);
  args.divisor = divisor ? floats("divisor", *divisor, {clouds}) : nullptr;
  args.wavelength = from.wavelength.data();
  args.rows = rows;
  args.centers = centers;
  args.neighbors = neighbors;
  args.width = width;
  args.beta = static_cast<float>(beta);
  args.guard = guard;
  return from;
}

Packed pack(const float* weight, const float* bias, int64_t to, int64_t from) {
  Packed packed{std::vector<float>((from + 1) * packed_columns(to)), {}};
  float* end = packed.room.data() + from * packed_columns(to);
  pack_linear(weight, bias, to, from, packed.room.data(), end);
  packed.linear = {packed.room.data(), end};
  return packed;
}

namespace {

// The units' tensors, checked; pack(weight, bias, out, in) takes each layer.
template <typename Unit, typename Pack>
std::vector<Unit> fold_units(const std::vector<Tensor>& tensors, int64_t width, int64_t* most,
                             const Pack& pack) {
  A2P_CHECK(tensors.size() % 4 == 0, "units: expected four tensors each");
  std::vector<Unit> units;
  for (size_t u = 0; u < tensors.size(); u += 4) {
    const int64_t hidden = tensors[u].size(0);
    const float* in = floats("units", tensors[u], {hidden, width});
    const float* out = floats("units", tensors[u + 2], {width, hidden});
    units.push_back({pack(in, floats("units", tensors[u + 1], {hidden}), hidden, width),
                     pack(out, floats("units", tensors[u + 3], {width}), width, hidden), hidden});
    *most = std::max(*most, hidden);
  }
  return units;
}

Tensor evaluate(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
                const OptionalTensor& divisor, const Tensor& wavelength, const std::vector<Tensor>& tensors,
                double beta, bool guard) {
  const From from = neighborhoods(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t width = from.rows.width, groups = from.clouds * from.rows.centers;
  Tensor out = torch::stable::new_empty(features, {from.clouds, from.rows.centers, width});
  LocalAggregate args{from.rows, nullptr, 0, 0, static_cast<float*>(out.mutable_data_ptr())};

  std::vector<Packed> packed;
  const auto units = fold_units<FoldedUnit>(
      tensors, width, &args.hidden, [&](const float* weight, const float* bias, int64_t to, int64_t in) {
        packed.push_back(pack(weight, bias, to, in));
        return packed.back().linear;
      });
  args.units = units.data();
  args.unit_count = static_cast<int64_t>(units.size());

  const int64_t scratch = local_aggregate_scratch(args);
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> room(scratch);
    local_aggregate_cpu(args, room.data(), begin, end);
  });
  return out;
}

Tensor evaluate_bf16(const Tensor& points, const Tensor& features, const Tensor& center,
                     const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                     const std::vector<Tensor>& tensors, double beta, bool guard) {
  A2P_CHECK(!features.is_cuda() && features.is_contiguous(), "features: expected a contiguous CPU tensor");
  const From from = neighborhoods(points, features, center, neighbor, divisor, wavelength, beta, guard, true);
  const int64_t width = from.rows.width, groups = from.clouds * from.rows.centers;
  Tensor out = torch::stable::new_empty(features, {from.clouds, from.rows.centers, width});
  LocalAggregateBf16 args{from.rows, static_cast<const BFloat16*>(features.const_data_ptr()), nullptr, 0,
                          0,         static_cast<BFloat16*>(out.mutable_data_ptr())};

  std::vector<std::vector<BFloat16>> weights;
  std::vector<std::vector<float>> biases;
  const auto units = fold_units<FoldedUnitBf16>(
      tensors, width, &args.hidden, [&](const float* weight, const float* bias, int64_t to, int64_t in) {
        weights.emplace_back(packed_bf16(to) * packed_bf16(in) + 32);
        biases.emplace_back(packed_bf16(to));
        const auto start = (reinterpret_cast<uintptr_t>(weights.back().data()) + 63) / 64 * 64;
        auto* packed = reinterpret_cast<BFloat16*>(start);  // whole cache lines for loads of tiles
        pack_linear_bf16(weight, bias, to, in, packed, biases.back().data());
        return PackedBf16{packed, biases.back().data()};
      });
  args.units = units.data();
  args.unit_count = static_cast<int64_t>(units.size());

  const int64_t scratch = local_aggregate_bf16_scratch(args);
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    std::vector<char> room(scratch);
    local_aggregate_bf16(args, room.data(), begin, end);
  });
  return out;
}

Tensor local_aggregate(const Tensor& points, const Tensor& features, const Tensor& center,
                       const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                       std::vector<Tensor> units, double beta, bool guard) {
  if (features.scalar_type() != ScalarType::BFloat16) {
    return evaluate(points, features, center, neighbor, divisor, wavelength, units, beta, guard);
  }
  if (multiplies_bf16()) {
    return evaluate_bf16(points, features, center, neighbor, divisor, wavelength, units, beta, guard);
  }
  const Tensor wide = torch::stable::to(features, ScalarType::Float);
  const Tensor out = evaluate(points, wide, center, neighbor, divisor, wavelength, units, beta, guard);
  return torch::stable::to(out, ScalarType::BFloat16);
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("_local_aggregate", TORCH_BOX(&any2point::local_aggregate));
}
