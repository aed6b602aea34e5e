#include <algorithm>
#include <tuple>

#include "local_aggregate/op.h"
#include "local_aggregate/train.h"

namespace any2point {
namespace {

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor zeros(const Tensor& like, std::vector<int64_t> shape) {
  Tensor tensor = torch::stable::new_empty(like, shape, ScalarType::Float);
  std::fill_n(data(tensor), tensor.numel(), 0.0f);
  return tensor;
}

// Groups per chunk, whatever the threads: sums are one per chunk.
struct Chunks {
  int64_t groups, each, count;

  Chunks(int64_t groups, int64_t least)
      : groups(groups), each(std::max<int64_t>(1, (groups + 63) / 64)), count(0) {
    least = std::max<int64_t>(1, least);
    each = (each + least - 1) / least * least;
    count = (groups + each - 1) / each;
  }
  // pass(chunk, scratch, begin, end)
  template <typename Pass>
  void run(int64_t scratch, const Pass& pass) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      std::vector<float> room(scratch);
      for (int64_t i = first; i < last; i++) {
        pass(i, room.data(), i * each, std::min(groups, (i + 1) * each));
      }
    });
  }
};

// Units that are done, and the tensors and packed weights that they point into.
struct Done {
  std::vector<TrainedUnit> units;
  std::vector<Packed> packed;
};

TrainedUnit hidden_of(const Tensor& before, const Tensor& scale, const Tensor& shift) {
  A2P_CHECK(before.dim() == 2, "before: expected [M, H]");
  const int64_t hidden = before.size(1);
  return {floats("before", before, {before.size(0), hidden}),
          floats("scale", scale, {hidden}),
          floats("shift", shift, {hidden}),
          {},
          hidden};
}

Done done_of(const std::vector<Tensor>& tensors, int64_t rows, int64_t width) {
  A2P_CHECK(tensors.size() % 5 == 0, "done: expected five tensors each");
  Done done;
  for (size_t u = 0; u < tensors.size(); u += 5) {
    TrainedUnit unit = hidden_of(tensors[u], tensors[u + 1], tensors[u + 2]);
    A2P_CHECK(tensors[u].size(0) == rows, "before: expected ", rows, " rows");
    const float* weight = floats("done", tensors[u + 3], {width, unit.hidden});
    done.packed.push_back(pack(weight, floats("done", tensors[u + 4], {width}), width, unit.hidden));
    unit.out = done.packed.back().linear;
    done.units.push_back(unit);
  }
  return done;
}

TrainedRows rows_of(const From& from, const Done& done, int64_t hidden) {
  for (const TrainedUnit& unit : done.units) hidden = std::max(hidden, unit.hidden);
  return {from.rows, done.units.data(), static_cast<int64_t>(done.units.size()), hidden};
}

// Passes that read only hidden layers: x plays no part.
TrainedRows hidden_rows(int64_t width, int64_t neighbors, int64_t hidden) {
  TrainedRows rows{};
  rows.from.width = width;
  rows.from.neighbors = neighbors;
  rows.hidden = hidden;
  return rows;
}

int64_t groups_of(const Tensor& before, int64_t neighbors) {
  A2P_CHECK(before.dim() == 2 && neighbors > 0 && before.size(0) % neighbors == 0,
            "before: expected [M, H] with M a multiple of K");
  return before.size(0) / neighbors;
}

RowGradient gradient_of(const OptionalTensor& grad, const OptionalTensor& argmax,
                        const std::vector<Tensor>& dense, int64_t groups, int64_t neighbors, int64_t width) {
  if (!dense.empty()) return {nullptr, nullptr, floats("dense", dense[0], {groups * neighbors, width})};
  A2P_CHECK(grad && argmax && argmax->scalar_type() == ScalarType::Int && argmax->is_contiguous() &&
                !argmax->is_cuda() && argmax->numel() == groups * width,
            "argmax: expected int32 [B, S, C]");
  const int32_t* rows = static_cast<const int32_t*>(argmax->const_data_ptr());
  for (int64_t i = 0; i < argmax->numel(); i++) {
    A2P_CHECK(rows[i] >= 0 && rows[i] < neighbors, "argmax: expected 0 to K - 1");
  }
  A2P_CHECK(grad->dim() == 3 && grad->numel() == argmax->numel(), "grad: expected [B, S, C]");
  return {floats("grad", *grad, {grad->size(0), grad->size(1), width}), rows, nullptr};
}

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four project(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
             const OptionalTensor& divisor, const Tensor& wavelength, double beta, bool guard,
             std::vector<Tensor> done_, const Tensor& weight, const Tensor& bias, bool,
             const OptionalTensor& to) {
  A2P_CHECK(!to, "to: expected none");
  const From from = neighborhoods(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t width = from.rows.width, groups = from.clouds * from.rows.centers;
  const int64_t total = groups * from.rows.neighbors, hidden = weight.size(0);
  const Done done = done_of(done_, total, width);
  const TrainedRows rows = rows_of(from, done, hidden);
  const Packed next =
      pack(floats("weight", weight, {hidden, width}), floats("bias", bias, {hidden}), hidden, width);
  const Chunks chunks(groups, tile_groups(from.rows.neighbors));
  const int64_t columns = packed_columns(hidden);
  Tensor before = torch::stable::new_empty(features, {total, hidden});
  Tensor mean = zeros(features, {chunks.count, columns}), spread = zeros(features, {chunks.count, columns});
  Tensor count = zeros(features, {chunks.count});
  chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
    train_project(rows, next.linear, hidden, data(before), data(mean) + i * columns,
                  data(spread) + i * columns, room, begin, end);
    data(count)[i] = static_cast<float>((end - begin) * from.rows.neighbors);
  });
  return {before, mean, spread, count};
}

Two gram(const Tensor& before, const Tensor& scale, const Tensor& shift, int64_t neighbors) {
  const TrainedUnit unit = hidden_of(before, scale, shift);
  const TrainedRows rows = hidden_rows(0, neighbors, unit.hidden);
  const Chunks chunks(groups_of(before, neighbors), tile_groups(neighbors));
  const int64_t columns = packed_columns(unit.hidden), size = padded6(unit.hidden) * columns;
  Tensor products = zeros(before, {chunks.count, padded6(unit.hidden), columns});
  Tensor sum = zeros(before, {chunks.count, unit.hidden});
  chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
    train_gram(rows, unit, data(products) + i * size, data(sum) + i * unit.hidden, room, begin, end);
  });
  return {products, sum};
}

Two maximum(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
            const OptionalTensor& divisor, const Tensor& wavelength, double beta, bool guard,
            std::vector<Tensor> done_) {
  const From from = neighborhoods(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t width = from.rows.width, groups = from.clouds * from.rows.centers;
  const Done done = done_of(done_, groups * from.rows.neighbors, width);
  const TrainedRows rows = rows_of(from, done, 0);
  Tensor out = torch::stable::new_empty(features, {from.clouds, from.rows.centers, width});
  Tensor argmax =
      torch::stable::new_empty(features, {from.clouds, from.rows.centers, width}, ScalarType::Int);
  const Chunks chunks(groups, tile_groups(from.rows.neighbors));
  chunks.run(train_scratch(rows), [&](int64_t, float* room, int64_t begin, int64_t end) {
    train_max(rows, data(out), static_cast<int32_t*>(argmax.mutable_data_ptr()), room, begin, end);
  });
  return {out, argmax};
}

Three out_sums(const Tensor& before, const Tensor& scale, const Tensor& shift, const Tensor& grad,
               const Tensor& argmax, int64_t neighbors, const Tensor& weight, const Tensor& bias,
               const Tensor& mean, const Tensor& deviation) {
  const TrainedUnit unit = hidden_of(before, scale, shift);
  const int64_t groups = groups_of(before, neighbors), width = weight.size(0);
  const TrainedRows rows = hidden_rows(width, neighbors, unit.hidden);
  const RowGradient du = gradient_of(grad, argmax, {}, groups, neighbors, width);
  const OutSums sums{floats("weight", weight, {width, unit.hidden}),
                     {},
                     floats("bias", bias, {width}),
                     floats("mean", mean, {width}),
                     floats("deviation", deviation, {width}),
                     nullptr,
                     nullptr,
                     nullptr};
  const Chunks chunks(groups, tile_groups(neighbors));
  const int64_t size = padded6(width) * packed_columns(unit.hidden);
  Tensor first = zeros(before, {chunks.count, width}), second = zeros(before, {chunks.count, width});
  Tensor outer = zeros(before, {chunks.count, padded6(width), packed_columns(unit.hidden)});
  chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
    OutSums mine = sums;
    mine.grad = data(first) + i * width;
    mine.grad_normed = data(second) + i * width;
    mine.outer = data(outer) + i * size;
    train_out_sums(rows, unit, du, mine, room, begin, end);
  });
  return {first, second, outer};
}

Two hidden_grad(const Tensor& before, const Tensor& scale, const Tensor& shift, const OptionalTensor& grad,
                const OptionalTensor& argmax, std::vector<Tensor> dense_, int64_t neighbors, const Tensor& q_,
                const Tensor& constant, const Tensor& weight_, const Tensor& mean, const Tensor& deviation,
                Tensor dz, std::vector<Tensor> dy1) {
  A2P_CHECK(dy1.empty(), "norm: expected none");
  const TrainedUnit unit = hidden_of(before, scale, shift);
  const int64_t groups = groups_of(before, neighbors), hidden = unit.hidden;
  // weight: [C, H] below a maximum, [H, C] as the layer that it is otherwise.
  const bool dense = !dense_.empty();
  const int64_t width = dense ? weight_.size(1) : weight_.size(0);
  const TrainedRows rows = hidden_rows(width, neighbors, hidden);
  const RowGradient du = gradient_of(grad, argmax, dense_, groups, neighbors, width);
  const Packed q =
      pack(floats("q", q_, {hidden, hidden}), floats("constant", constant, {hidden}), hidden, hidden);
  const float* weight =
      dense ? floats("weight", weight_, {hidden, width}) : floats("weight", weight_, {width, hidden});
  const Packed out = dense ? pack(weight, nullptr, hidden, width) : Packed{};
  const InNorm norm{floats("mean", mean, {hidden}), floats("deviation", deviation, {hidden}), nullptr,
                    nullptr, nullptr};
  const Chunks chunks(groups, tile_groups(neighbors));
  floats("dz", dz, {before.size(0), hidden});
  Tensor sum = zeros(before, {chunks.count, hidden}), normed = zeros(before, {chunks.count, hidden});
  chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
    train_hidden_grad(rows, unit, du, q.linear, weight, out.linear, norm, data(dz), data(sum) + i * hidden,
                      data(normed) + i * hidden, room, begin, end);
  });
  return {sum, normed};
}

// weight [C, H]: W1'. norm: mean, deviation, factor, m1, m2. below: weight [C, H], bias, mean and deviation
// [C] of the unit before, if there is one. Returns the gradient of W1 in chunks, and then, of the unit
// before, du, its two sums and its outer product; or by_neighbor, by_center and features.
std::vector<Tensor> rows_grad(const Tensor& points, const Tensor& features, const Tensor& center,
                              const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                              double beta, bool guard, std::vector<Tensor> done_, const Tensor& before,
                              const OptionalTensor& grad, const OptionalTensor& argmax,
                              std::vector<Tensor> dense, Tensor dz, std::vector<Tensor> norm_,
                              const Tensor& weight, std::vector<Tensor> below) {
  const From from = neighborhoods(points, features, center, neighbor, divisor, wavelength, beta, guard);
  const int64_t width = from.rows.width, groups = from.clouds * from.rows.centers;
  const int64_t total = groups * from.rows.neighbors, hidden = before.size(1);
  const Done done = done_of(done_, total, width);
  const TrainedRows rows = rows_of(from, done, hidden);
  const RowGradient du = gradient_of(grad, argmax, dense, groups, from.rows.neighbors, width);
  A2P_CHECK(norm_.size() == 5 && below.size() == (done_.empty() ? 0 : 4),
            "norm, below: expected 5 and 4 tensors");
  const TrainedUnit unit{floats("before", before, {total, hidden}), nullptr, nullptr, {}, hidden};
  const float* statistics[5];
  for (int i = 0; i < 5; i++) statistics[i] = floats("norm", norm_[i], {hidden});
  const InNorm norm{statistics[0], statistics[1], statistics[2], statistics[3], statistics[4]};
  const Packed in = pack(floats("weight", weight, {width, hidden}), nullptr, width, hidden);
  const float* above = floats("dz", dz, {total, hidden});

  const Chunks chunks(groups, done_.empty() ? from.rows.centers : tile_groups(from.rows.neighbors));
  const int64_t size = padded6(hidden) * packed_columns(width);
  Tensor weight_grad = zeros(before, {chunks.count, padded6(hidden), packed_columns(width)});
  RowsGradOut to{nullptr, &in.linear, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (done_.empty()) {
    Tensor by_neighbor = zeros(before, {from.clouds, from.rows.rows, hidden});
    Tensor by_center = zeros(before, {from.clouds, from.rows.rows, hidden});
    Tensor direct = zeros(before, {from.clouds, from.rows.rows, width / 2});
    to.by_neighbor = data(by_neighbor);
    to.by_center = data(by_center);
    to.features = data(direct);
    chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
      RowsGradOut mine = to;
      mine.weight_grad = data(weight_grad) + i * size;
      train_rows_grad(rows, unit, du, above, norm, mine, room, begin, end);
    });
    return {weight_grad, by_neighbor, by_center, direct};
  }
  const int64_t last = done.units.back().hidden, outer_size = padded6(width) * packed_columns(last);
  const float* last_weight = floats("below", below[0], {width, last});
  const float* last_bias = floats("below", below[1], {width});
  const Packed product = pack(last_weight, last_bias, width, last);
  const OutSums sums{last_weight,
                     product.linear,
                     last_bias,
                     floats("below", below[2], {width}),
                     floats("below", below[3], {width}),
                     nullptr,
                     nullptr,
                     nullptr};
  Tensor next = torch::stable::new_empty(before, {total, width});
  Tensor first = zeros(before, {chunks.count, width}), second = zeros(before, {chunks.count, width});
  Tensor outer = zeros(before, {chunks.count, padded6(width), packed_columns(last)});
  to.du = data(next);
  chunks.run(train_scratch(rows), [&](int64_t i, float* room, int64_t begin, int64_t end) {
    OutSums here = sums;
    here.grad = data(first) + i * width;
    here.grad_normed = data(second) + i * width;
    here.outer = data(outer) + i * outer_size;
    RowsGradOut mine = to;
    mine.weight_grad = data(weight_grad) + i * size;
    mine.sums = &here;
    train_rows_grad(rows, unit, du, above, norm, mine, room, begin, end);
  });
  return {weight_grad, next, first, second, outer};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("_local_aggregate_project", TORCH_BOX(&any2point::project));
  m.impl("_local_aggregate_gram", TORCH_BOX(&any2point::gram));
  m.impl("_local_aggregate_max", TORCH_BOX(&any2point::maximum));
  m.impl("_local_aggregate_out_sums", TORCH_BOX(&any2point::out_sums));
  m.impl("_local_aggregate_hidden_grad", TORCH_BOX(&any2point::hidden_grad));
  m.impl("_local_aggregate_rows_grad", TORCH_BOX(&any2point::rows_grad));
}
