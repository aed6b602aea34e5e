// Guided aggregation on the CPU: the passes of cpu.h in order, with torch's threads, and the statistics
// between them in float64.
#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "guided_aggregate/cpu.h"
#include "inverse_list/op.h"

namespace any2point {
namespace {

constexpr int64_t kTokens = 16;  // per task

// Room that is not filled before use.
template <typename T>
class Room {
 public:
  explicit Room(int64_t count = 0) : data_(count > 0 ? new T[count] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

template <typename Task>
void each(int64_t count, int64_t grain, const Task& task) {
  torch::stable::parallel_for(0, count, grain, task);
}

// Rows of channels as the passes take them: the caller's own where they are that already.
class PaddedRows {
 public:
  PaddedRows(Dtype dtype, const void* from, int64_t rows, int64_t channels, int64_t stride) {
    if (dtype == Dtype::f32 && channels == stride) {
      rows_ = static_cast<const float*>(from);
      return;
    }
    room_ = Room<float>(rows * stride);
    rows_ = room_.get();
    each(rows, 64, [&](int64_t begin, int64_t end) {
      dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t r = begin; r < end; r++) {
          const T* row = static_cast<const T*>(from) + r * channels;
          float* to = room_.get() + r * stride;
          for (int64_t c = 0; c < channels; c++) to[c] = static_cast<float>(widen(row[c]));
          std::fill(to + channels, to + stride, 0.0f);
        }
      });
    });
  }
  const float* get() const { return rows_; }

 private:
  Room<float> room_;
  const float* rows_;
};

// A result with padded rows, and where it goes: straight there if it can.
class Result {
 public:
  Result(Dtype dtype, void* to, int64_t rows, int64_t channels, int64_t stride)
      : dtype_(dtype), to_(to), rows_(rows), channels_(channels), stride_(stride) {
    direct_ = dtype == Dtype::f32 && channels == stride;
    if (!direct_) room_ = Room<float>(rows * stride);
  }
  float* get() const { return direct_ ? static_cast<float*>(to_) : room_.get(); }
  void finish() const {
    if (direct_) return;
    each(rows_, 64, [&](int64_t begin, int64_t end) {
      dispatch(dtype_, [&](auto type) {
        using T = decltype(type);
        for (int64_t r = begin; r < end; r++) {
          const float* row = room_.get() + r * stride_;
          T* out = static_cast<T*>(to_) + r * channels_;
          for (int64_t c = 0; c < channels_; c++) narrow(row[c], out + c);
        }
      });
    });
  }

 private:
  Dtype dtype_;
  void* to_;
  int64_t rows_, channels_, stride_;
  bool direct_;
  Room<float> room_;
};

// What a direct call could get wrong and a pass would follow out of bounds.
void check_lists(const Guided& args) {
  const int64_t rows = args.clouds * args.tokens;
  for (int64_t layer = 0; layer < args.layers; layer++) {
    const int32_t *order = args.order + layer * rows, *segment = args.segment + layer * rows;
    const int32_t* start = args.start + layer * (rows + 1);
    bool right = start[0] >= 0 && start[rows] <= rows;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t first = layer < args.views ? i / args.tokens * args.tokens : 0;
      const int64_t last = layer < args.views ? first + args.tokens : rows;
      const int64_t least = layer < args.views ? first : -1;
      right = right && start[i] <= start[i + 1] && order[i] >= first && order[i] < last;
      right = right && segment[i] >= least && segment[i] < last && (i != first || start[i] >= first);
      right = right && (layer >= args.views || (start[i] >= first && start[i + 1] <= last));
      right = right && (segment[i] < 0 || start[segment[i] + 1] > start[segment[i]]);
    }
    A2P_CHECK(right, "order, segment, start: expected lists as _guided_lists makes them");
  }
}

// The passes' arguments and the memory that they point into.
struct Work {
  GuidedRows rows{};
  std::vector<int64_t> held;  // [L, B]: segments with tokens
  std::vector<int32_t> shift, row;
  int64_t last = 0;  // Z
  PaddedRows features, qkv;
  Room<float> buffer, alpha;

  Work(const Guided& args, int64_t stride)
      : features(args.dtype, args.features, args.clouds * args.tokens, args.channels, stride),
        qkv(args.qkv_dtype, args.qkv, args.clouds * args.tokens, args.views * 3 * args.inner,
            args.views * 3 * args.inner) {
    check_lists(args);
    rows.clouds = args.clouds;
    rows.tokens = args.tokens;
    rows.stride = stride;
    rows.views = args.views;
    rows.layers = args.layers;
    rows.inner = args.inner;
    rows.heads = args.heads;
    rows.maximum = args.maximum;
    rows.adaptive = args.ensemble == Ensemble::adaptive;
    rows.ensemble = args.ensemble;
    rows.scale = args.scale;
    rows.coefficient = args.coefficient;
    rows.features = features.get();
    rows.qkv = qkv.get();
    rows.keep = args.keep;
    rows.order = args.order;
    rows.segment = args.segment;
    rows.start = args.start;
    const int64_t count = rows.rows(), pad = rows.width(), columns = rows.layers * stride;
    const int64_t proj = rows.views * pad * stride, hidden = rows.views * count * pad;
    number_rows();
    buffer = Room<float>(proj + 4 * columns + hidden + last * pad + (2 * last + 1) * stride + last + 1);
    float* next = buffer.get();
    const auto take = [&](int64_t size) {
      float* room = next;
      next += size;
      return room;
    };
    float* padded = take(proj);
    std::fill(padded, padded + proj, 0.0f);
    for (int64_t v = 0; v < rows.views; v++) {
      for (int64_t m = 0; m <= rows.inner; m++) {
        const float* from = args.proj + (v * (rows.inner + 1) + m) * args.channels;
        std::copy(from, from + args.channels, padded + (v * pad + m) * stride);
      }
    }
    rows.proj = padded;
    float* statistics = take(4 * columns);
    std::fill(statistics, statistics + 4 * columns, 0.0f);
    rows.mean = statistics;
    rows.deviation = statistics + columns;
    rows.factor = statistics + 2 * columns;
    rows.bias = statistics + 3 * columns;
    rows.hidden = take(hidden);
    rows.pooled = take(last * pad);
    rows.z = take(last * stride);
    rows.g = take((last + 1) * stride);
    std::fill(rows.g + last * stride, rows.g + (last + 1) * stride, 0.0f);
    rows.length = take(last + 1);
    rows.length[last] = 1e-8f;
    alpha = Room<float>(count * rows.views);
    rows.alpha = alpha.get();
  }

  // Rows of segments in the order of the layers, without the room that empty segments would take up behind
  // the last of each cloud's cells and behind the last voxel.
  void number_rows() {
    const int64_t count = rows.rows();
    A2P_CHECK(rows.layers * count < INT32_MAX, "features: expected fewer tokens");
    held.resize(rows.layers * rows.clouds);
    shift.resize(rows.layers * rows.clouds);
    row.resize(rows.layers * count);
    for (int64_t layer = 0; layer < rows.layers; layer++) {
      const int32_t* start = rows.start + layer * (count + 1);
      const bool view = layer < rows.views;
      if (!view) rows.first_maximum = last;
      const int64_t base = last;
      for (int64_t cloud = 0; cloud < rows.clouds; cloud++) {
        const int64_t first = cloud * rows.tokens, chunk = layer * rows.clouds + cloud;
        const int64_t here = view ? last - first : base;
        shift[chunk] = static_cast<int32_t>(here);
        for (int64_t i = first; i < first + rows.tokens; i++) {
          if (start[i + 1] == start[i]) continue;
          held[chunk]++;
          last = here + i + 1;
        }
      }
    }
    for (int64_t layer = 0; layer < rows.layers; layer++) {
      for (int64_t i = 0; i < count; i++) {
        const int32_t seg = rows.segment[layer * count + i];
        const int32_t from = shift[layer * rows.clouds + i / rows.tokens];
        row[layer * count + i] = seg < 0 ? static_cast<int32_t>(last) : seg + from;
      }
    }
    if (rows.maximum) rows.first_maximum = 0;
    rows.shift = shift.data();
    rows.row = row.data();
  }

  int64_t chunks() const { return rows.layers * rows.clouds; }

  // Rows that the statistics of a layer count.
  double counted(const Guided& args, int64_t layer) const {
    if (args.total > 0 && layer < args.views) return static_cast<double>(args.total);
    return static_cast<double>(std::max<int64_t>(1, present(layer)));
  }
  int64_t present(int64_t layer) const {
    int64_t sum = 0;
    for (int64_t b = 0; b < rows.clouds; b++) sum += held[layer * rows.clouds + b];
    return sum;
  }

  // The rows z, with parts [chunks, 2, P] for their statistics unless those are null.
  void pool(float* parts) {
    each(chunks(), 1, [&](int64_t begin, int64_t end) {
      Room<float> scratch(guided_scratch(rows));
      for (int64_t chunk = begin; chunk < end; chunk++) {
        if (chunk < rows.views * rows.clouds) guided_attend_cpu(rows, chunk, scratch.get());
        float* part = parts ? parts + chunk * 2 * rows.stride : nullptr;
        guided_pool_cpu(rows, chunk, part, parts ? part + rows.stride : nullptr, scratch.get());
      }
    });
  }

  // mean and deviation [L, C] into the rows', with what they make of the normalisation.
  void normalize(const Guided& args, const float* mean, const float* deviation) {
    for (int64_t layer = 0; layer < rows.layers; layer++) {
      const bool view = layer < rows.views;
      const int64_t own = view ? layer * args.channels : 0;
      const float* weight = view ? args.view_weight + own : args.space_weight;
      const float* bias = view ? args.view_bias + own : args.space_bias;
      float* to = buffer.get() + (rows.mean - buffer.get()) + layer * rows.stride;
      const int64_t columns = rows.layers * rows.stride;
      for (int64_t c = 0; c < args.channels; c++) {
        const float m = mean[layer * args.channels + c], d = deviation[layer * args.channels + c];
        to[c] = m;
        to[columns + c] = d;
        to[2 * columns + c] = d * weight[c];
        to[3 * columns + c] = bias[c];
      }
    }
    each(chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) guided_activate_cpu(rows, chunk);
    });
  }
};

void batch_statistics(const GuidedForward& args, const Work& work, const float* parts) {
  const int64_t stride = work.rows.stride, clouds = args.clouds;
  for (int64_t layer = 0; layer < args.layers; layer++) {
    const double all = work.counted(args, layer);
    const double empty = std::max(0.0, all - static_cast<double>(work.present(layer)));
    for (int64_t c = 0; c < args.channels; c++) {
      double sum = 0, spread = 0;
      const auto part = [&](int64_t b, int64_t which) {
        return static_cast<double>(parts[((layer * clouds + b) * 2 + which) * stride + c]);
      };
      const auto size = [&](int64_t b) { return static_cast<double>(work.held[layer * clouds + b]); };
      for (int64_t b = 0; b < clouds; b++) sum += size(b) * part(b, 0);
      const double mean = sum / all;
      for (int64_t b = 0; b < clouds; b++) {
        spread += part(b, 1) + size(b) * (part(b, 0) - mean) * (part(b, 0) - mean);
      }
      const double variance = (spread + empty * mean * mean) / all;
      const int64_t i = layer * args.channels + c;
      args.mean[i] = static_cast<float>(mean);
      args.deviation[i] = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(args.eps)));
      args.unbiased[i] = static_cast<float>(variance * (all / std::max(1.0, all - 1)));
    }
  }
}

void running_statistics(const GuidedForward& args) {
  const int64_t split = args.views * args.channels;
  for (int64_t i = 0; i < args.layers * args.channels; i++) {
    const double variance = i < split ? args.view_variance[i] : args.space_variance[i - split];
    args.mean[i] = i < split ? args.view_mean[i] : args.space_mean[i - split];
    args.deviation[i] = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(args.eps)));
    args.unbiased[i] = static_cast<float>(variance);
  }
}

}  // namespace

int64_t guided_lists_cpu(const GuidedLists& args) {
  const int64_t rows = args.clouds * args.tokens;
  if (rows == 0) {
    std::fill(args.start, args.start + args.layers, 0);
    std::fill(args.count, args.count + args.layers * args.clouds, 0);
    return -1;
  }
  for (int64_t i = 0; i < rows && args.cluster; i++) {
    if (args.cluster[i] < -1 || args.cluster[i] >= rows) return i;
  }
  each(args.views * args.clouds, 1, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, int32_t>> tokens(args.tokens);
    for (int64_t i = begin; i < end; i++) {
      const int64_t view = i / args.clouds, cloud = i % args.clouds, first = cloud * args.tokens;
      const int64_t* cell = args.cell + (cloud * args.views + view) * args.tokens;
      int32_t *order = args.order + view * rows, *segment = args.segment + view * rows;
      int32_t* start = args.start + view * (rows + 1);
      for (int64_t s = 0; s < args.tokens; s++) tokens[s] = {cell[s], static_cast<int32_t>(first + s)};
      std::sort(tokens.begin(), tokens.end());
      int64_t held = 0;
      for (int64_t s = 0; s < args.tokens; s++) {
        if (s == 0 || tokens[s].first != tokens[s - 1].first) {
          start[first + held++] = static_cast<int32_t>(first + s);
        }
        order[first + s] = tokens[s].second;
        segment[tokens[s].second] = static_cast<int32_t>(first + held - 1);
      }
      std::fill(start + first + held, start + first + args.tokens + (cloud + 1 == args.clouds),
                static_cast<int32_t>(first + args.tokens));
      args.count[view * args.clouds + cloud] = static_cast<int32_t>(held);
    }
  });
  if (!args.cluster) return -1;
  int32_t *order = args.order + args.views * rows, *segment = args.segment + args.views * rows;
  int32_t *start = args.start + args.views * (rows + 1), *count = args.count + args.views * args.clouds;
  std::fill(start, start + rows + 1, 0);
  for (int64_t i = 0; i < rows; i++) {
    segment[i] = static_cast<int32_t>(args.cluster[i]);
    if (segment[i] >= 0) start[segment[i] + 1]++;
  }
  std::fill(count, count + args.clouds, 0);
  for (int64_t i = 0; i < rows; i++) {
    count[i / args.tokens] += start[i + 1] > 0;
    start[i + 1] += start[i];
  }
  std::vector<int32_t> next(start, start + rows + 1);  // the last: tokens without a voxel, behind all others
  for (int64_t i = 0; i < rows; i++) {
    order[next[segment[i] >= 0 ? segment[i] : rows]++] = static_cast<int32_t>(i);
  }
  return -1;
}

void guided_forward_cpu(const GuidedForward& args) {
  const int64_t stride = padded16(args.channels), count = args.clouds * args.tokens;
  if (!args.training) running_statistics(args);
  if (count == 0) {
    if (!args.training) return;
    const int64_t columns = args.layers * args.channels;
    for (float* to : {args.mean, args.deviation, args.unbiased}) std::fill(to, to + columns, 0.0f);
    return;
  }
  Work work(args, stride);
  Room<float> parts(args.training ? work.chunks() * 2 * stride : 0);
  work.pool(parts.get());
  if (args.training) batch_statistics(args, work, parts.get());
  work.normalize(args, args.mean, args.deviation);
  const Result out(args.dtype, args.out, count, args.channels, stride);
  each(count, kTokens,
       [&](int64_t begin, int64_t end) { guided_blend_cpu(work.rows, out.get(), begin, end); });
  out.finish();
}

void guided_backward_cpu(const GuidedBackward& args) {
  const int64_t stride = padded16(args.channels), count = args.clouds * args.tokens;
  const int64_t channels = args.channels, views = args.views, clouds = args.clouds;
  std::fill(args.grad_proj, args.grad_proj + views * (args.inner + 1) * channels, 0.0f);
  std::fill(args.grad_view_weight, args.grad_view_weight + views * channels, 0.0f);
  std::fill(args.grad_view_bias, args.grad_view_bias + views * channels, 0.0f);
  if (args.layers > views) {
    std::fill(args.grad_space_weight, args.grad_space_weight + channels, 0.0f);
    std::fill(args.grad_space_bias, args.grad_space_bias + channels, 0.0f);
  }
  if (count == 0) return;
  Work work(args, stride);
  GuidedRows& rows = work.rows;
  const PaddedRows grad(args.dtype, args.grad, count, channels, stride);
  const int64_t columns = rows.layers * stride, chunks = work.chunks(), pad = rows.width();
  const Room<int32_t> argmax(rows.layers > views || args.maximum ? (work.last - rows.first_maximum) * stride
                                                                 : 0);
  const Room<float> room(work.last * stride + 2 * columns + count * (2 * views + 1));
  rows.argmax = argmax.get();
  rows.grad = grad.get();
  rows.dz = room.get();
  float* means = rows.dz + work.last * stride;
  std::fill(means, means + 2 * columns, 0.0f);
  rows.m1 = means;
  rows.m2 = means + columns;
  rows.beta = means + 2 * columns;
  rows.gamma = rows.beta + count * views;
  rows.delta = rows.gamma + count * views;
  work.pool(nullptr);
  work.normalize(args, args.mean, args.deviation);
  if (args.ensemble != Ensemble::max) {
    each(count, kTokens, [&](int64_t begin, int64_t end) { guided_weights_grad_cpu(rows, begin, end); });
  }

  Room<float> sums(chunks * 2 * stride);
  each(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* sum = sums.get() + chunk * 2 * stride;
      guided_rows_grad_cpu(rows, chunk, sum, sum + stride);
    }
  });
  for (int64_t layer = 0; layer < rows.layers; layer++) {
    const bool view = layer < views;
    const double all = work.counted(args, layer);
    float* weight = view ? args.grad_view_weight + layer * channels : args.grad_space_weight;
    float* bias = view ? args.grad_view_bias + layer * channels : args.grad_space_bias;
    for (int64_t c = 0; c < channels; c++) {
      double sum = 0, normed = 0;
      for (int64_t b = 0; b < clouds; b++) {
        const float* part = sums.get() + (layer * clouds + b) * 2 * stride + c;
        sum += part[0];
        normed += part[stride];
      }
      weight[c] = static_cast<float>(normed);
      bias[c] = static_cast<float>(sum);
      if (!args.training) continue;
      means[layer * stride + c] = static_cast<float>(sum / all);
      means[columns + layer * stride + c] = static_cast<float>(normed / all);
    }
  }

  Room<float> projections(views * clouds * pad * stride);
  const int64_t width = views * 3 * args.inner;
  const Result grad_qkv(args.qkv_dtype, args.grad_qkv, count, width, width);
  each(chunks, 1, [&](int64_t begin, int64_t end) {
    Room<float> scratch(guided_scratch(rows));
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* part = chunk < views * clouds ? projections.get() + chunk * pad * stride : nullptr;
      guided_pool_grad_cpu(rows, chunk, part, grad_qkv.get(), scratch.get());
    }
  });
  grad_qkv.finish();
  each(views * (args.inner + 1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t view = i / (args.inner + 1), m = i % (args.inner + 1);
      for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t b = 0; b < clouds; b++) {
          sum += projections.get()[((view * clouds + b) * pad + m) * stride + c];
        }
        args.grad_proj[i * channels + c] = static_cast<float>(sum);
      }
    }
  });
  const Result grad_features(args.dtype, args.grad_features, count, channels, stride);
  each(count, kTokens,
       [&](int64_t begin, int64_t end) { guided_features_grad_cpu(rows, grad_features.get(), begin, end); });
  grad_features.finish();
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> lists(const Tensor& cell_, const OptionalTensor& cluster_,
                                                 int64_t cells) {
  A2P_CHECK(cell_.dim() == 3, "cell: expected [B, V, S]");
  const int64_t clouds = cell_.size(0), views = cell_.size(1), tokens = cell_.size(2), rows = clouds * tokens;
  A2P_CHECK(cells > 0 && rows < (int64_t(1) << 30), "cell: expected fewer than 2^30 tokens");
  const int64_t layers = views + (cluster_ ? 1 : 0);
  const Tensor cell = index_tensor("cell", cell_, {clouds, views, tokens}, cell_);
  const auto make = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(cell, shape, ScalarType::Int);
  };
  Tensor order = make({layers, rows}), segment = make({layers, rows}), start = make({layers, rows + 1});
  Tensor count = make({layers, clouds}), cluster;
  GuidedLists args{clouds,  tokens,  views,   layers,  cells,  cell.const_data_ptr<int64_t>(),
                   nullptr, nullptr, nullptr, nullptr, nullptr};
  if (cluster_) {
    cluster = index_tensor("cluster", *cluster_, {clouds, tokens}, cell);
    args.cluster = cluster.const_data_ptr<int64_t>();
  }
  const auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  args.order = data(order);
  args.segment = data(segment);
  args.start = data(start);
  args.count = data(count);
  const int64_t bad = guided_lists_cpu(args);
  if (bad >= 0) refuse_index("cluster", args.cluster, bad, rows);
  return {order, segment, start, count};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) { m.impl("_guided_lists", TORCH_BOX(&any2point::lists)); }
