#include "local_aggregate/train.h"

#include "local_aggregate/tile.h"

namespace any2point {
namespace A2P_ISA {
namespace {

// The groups [first, first + groups) that a thread is at, with room for their rows: x and y [rows, C], h and
// z [rows, H], all in strides of 48 floats, so that blocks of six and whole vectors stay inside.
struct Tile {
  int64_t first, groups, used, rows, x_stride, h_stride, limit;
  float *x, *y, *h, *z, *offset;
};

Tile make_tile(const TrainedRows& args, float* scratch) {
  Tile tile{};
  tile.x_stride = train_stride(args.from.width);
  tile.h_stride = train_stride(args.hidden);
  tile.limit = tile_groups(args.from.neighbors);
  const int64_t most = padded6(tile.limit * args.from.neighbors);
  tile.x = scratch;
  tile.y = tile.x + most * tile.x_stride;
  tile.h = tile.y + most * tile.x_stride;
  tile.z = tile.h + most * tile.h_stride;
  tile.offset = tile.z + most * tile.h_stride;
  memset(scratch, 0, sizeof(float) * 2 * most * (tile.x_stride + tile.h_stride));
  return tile;
}

void move(Tile* tile, const TrainedRows& args, int64_t group, int64_t end) {
  tile->first = group;
  tile->groups = end - group < tile->limit ? end - group : tile->limit;
  tile->used = tile->groups * args.from.neighbors;
  tile->rows = padded6(tile->used);
}

int64_t first_row(const TrainedRows& args, const Tile& tile) { return tile.first * args.from.neighbors; }

// to [used, stride] = the tile's rows of from [M, count].
void load_rows(const Tile& tile, const float* from, int64_t count, float* to, int64_t stride) {
  for (int64_t r = 0; r < tile.used; r++) memcpy(to + r * stride, from + r * count, sizeof(float) * count);
}

// to = ReLU(scale before + shift).
void load_hidden(const TrainedRows& args, const Tile& tile, const TrainedUnit& unit, float* to) {
  const float* from = unit.before + first_row(args, tile) * unit.hidden;
  const Float zero = splat(0.0f);
  for (int64_t r = 0; r < tile.used; r++, from += unit.hidden) {
    float* row = to + r * tile.h_stride;
    int64_t j = 0;
    for (; j + kLanes <= unit.hidden; j += kLanes) {
      store(row + j, max(zero, fma(load(from + j), load(unit.scale + j), load(unit.shift + j))));
    }
    for (; j < unit.hidden; j++) {
      const float value = __builtin_fmaf(from[j], unit.scale[j], unit.shift[j]);
      row[j] = 0.0f > value ? 0.0f : value;
    }
  }
}

// tile.x after the units that are done; tile.h is used on the way.
void load_x(const TrainedRows& args, const Tile& tile) {
  const int64_t count = args.from.neighbors, width = args.from.width;
  for (int64_t g = 0; g < tile.groups; g++) {
    build_rows(args.from, tile.first + g, tile.offset, tile.x + g * count * tile.x_stride, tile.x_stride);
  }
  for (int64_t u = 0; u < args.done_count; u++) {
    const TrainedUnit& unit = args.done[u];
    load_hidden(args, tile, unit, tile.h);
    layer<Into::add_relu>(tile.h, tile.h_stride, unit.out, unit.hidden, width, tile.x, tile.x_stride,
                          tile.rows);
  }
}

template <int V>
A2P_INLINE void outer_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                            float* to, int64_t stride) {
  Float acc[kRows][V];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[i][v] = load(to + i * stride + v * kLanes);
  }
  for (int64_t r = 0; r < rows; r++, a += a_stride, b += b_stride) {
    Float row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const Float value = splat(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[i][v] = fma(value, row[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(to + i * stride + v * kLanes, acc[i][v]);
  }
}

// to [padded6(na), packed_columns(nb)] += a' b, a [rows, na], b [rows, nb].
void add_outer(const float* a, int64_t a_stride, int64_t na, const float* b, int64_t b_stride, int64_t nb,
               int64_t rows, float* to) {
  const int64_t columns = padded(nb), stride = packed_columns(nb);
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t vectors = (columns - j < kPanel ? columns - j : kPanel) / kLanes;
    for (int64_t i = 0; i < na; i += kRows) {
      float* block = to + i * stride + j;
      switch (vectors) {
#if defined(__AVX512F__)
        case 4:
          outer_block<4>(a + i, a_stride, b + j, b_stride, rows, block, stride);
          break;
        case 3:
          outer_block<3>(a + i, a_stride, b + j, b_stride, rows, block, stride);
          break;
#endif
        case 2:
          outer_block<2>(a + i, a_stride, b + j, b_stride, rows, block, stride);
          break;
        default:
          outer_block<1>(a + i, a_stride, b + j, b_stride, rows, block, stride);
      }
    }
  }
}

// to += factor * from.
A2P_INLINE void add_scaled(float factor, const float* from, int64_t count, float* to) {
  const Float f = splat(factor);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, fma(f, load(from + j), load(to + j)));
  for (; j < count; j++) to[j] = __builtin_fmaf(factor, from[j], to[j]);
}

A2P_INLINE float dot(const float* a, const float* b, int64_t count) {
  Float acc = splat(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) acc = fma(load(a + j), load(b + j), acc);
  float lane[kLanes], total = 0;
  store(lane, acc);
  for (int i = 0; i < kLanes; i++) total += lane[i];
  for (; j < count; j++) total = __builtin_fmaf(a[j], b[j], total);
  return total;
}

// Merges the columns' mean and squared spread of a tile into those of `before` rows.
void merge_statistics(const float* rows, int64_t stride, int64_t used, int64_t count, int64_t before,
                      float* mean, float* spread) {
  const float all = static_cast<float>(before + used);
  const Float part = splat(static_cast<float>(used) / all), each = splat(1.0f / static_cast<float>(used));
  const Float both = splat(static_cast<float>(before) * static_cast<float>(used) / all);
  for (int64_t j = 0; j < count; j += kLanes) {
    Float sum = splat(0.0f), square = splat(0.0f);
    for (int64_t r = 0; r < used; r++) sum = add(sum, load(rows + r * stride + j));
    const Float here = mul(sum, each);
    for (int64_t r = 0; r < used; r++) {
      const Float d = sub(load(rows + r * stride + j), here);
      square = fma(d, d, square);
    }
    const Float delta = sub(here, load(mean + j));
    store(mean + j, fma(delta, part, load(mean + j)));
    store(spread + j, add(load(spread + j), fma(mul(delta, delta), both, square)));
  }
}

// Calls entry(row of the tile, channel, gradient) for what comes through the maximum.
template <typename Entry>
A2P_INLINE void each_entry(const TrainedRows& args, const Tile& tile, const RowGradient& du, Entry entry) {
  const int64_t width = args.from.width;
  for (int64_t g = 0; g < tile.groups; g++) {
    const float* grad = du.grad + (tile.first + g) * width;
    const int32_t* argmax = du.argmax + (tile.first + g) * width;
    for (int64_t c = 0; c < width; c++) {
      if (grad[c] != 0) entry(g * args.from.neighbors + argmax[c], c, grad[c]);
    }
  }
}

// Sums over rows of du [used, C] and normalised products y [used, C], and du' h.
void add_out_sums(const Tile& tile, const float* du, const float* y, const float* h, int64_t width,
                  int64_t hidden, const OutSums& sums) {
  for (int64_t r = 0; r < tile.used; r++) {
    const float* grad = du + r * tile.x_stride;
    const float* value = y + r * tile.x_stride;
    for (int64_t c = 0; c < width; c++) {
      sums.grad[c] += grad[c];
      sums.grad_normed[c] += grad[c] * ((value[c] - sums.mean[c]) * sums.deviation[c]);
    }
  }
  add_outer(du, tile.x_stride, width, h, tile.h_stride, hidden, tile.used, sums.outer);
}

}  // namespace

void project(const TrainedRows& args, const PackedLinear& next, int64_t hidden, float* before, float* mean,
             float* spread, float* scratch, int64_t begin, int64_t end) {
  Tile tile = make_tile(args, scratch);
  int64_t done = 0;
  for (int64_t group = begin; group < end; group += tile.groups, done += tile.used) {
    move(&tile, args, group, end);
    load_x(args, tile);
    layer<Into::store>(tile.x, tile.x_stride, next, args.from.width, hidden, tile.h, tile.h_stride,
                       tile.rows);
    merge_statistics(tile.h, tile.h_stride, tile.used, hidden, done, mean, spread);
    float* to = before + first_row(args, tile) * hidden;
    for (int64_t r = 0; r < tile.used; r++) {
      memcpy(to + r * hidden, tile.h + r * tile.h_stride, sizeof(float) * hidden);
    }
  }
}

void gram(const TrainedRows& args, const TrainedUnit& unit, float* gram, float* sum, float* scratch,
          int64_t begin, int64_t end) {
  Tile tile = make_tile(args, scratch);
  for (int64_t group = begin; group < end; group += tile.groups) {
    move(&tile, args, group, end);
    load_hidden(args, tile, unit, tile.h);
    for (int64_t r = 0; r < tile.used; r++) {
      for (int64_t j = 0; j < unit.hidden; j++) sum[j] += tile.h[r * tile.h_stride + j];
    }
    add_outer(tile.h, tile.h_stride, unit.hidden, tile.h, tile.h_stride, unit.hidden, tile.used, gram);
  }
}

void maximum(const TrainedRows& args, float* out, int32_t* argmax, float* scratch, int64_t begin,
             int64_t end) {
  Tile tile = make_tile(args, scratch);
  const int64_t count = args.from.neighbors, width = args.from.width;
  for (int64_t group = begin; group < end; group += tile.groups) {
    move(&tile, args, group, end);
    load_x(args, tile);
    for (int64_t g = 0; g < tile.groups; g++) {
      const float* x = tile.x + g * count * tile.x_stride;
      float* best = out + (group + g) * width;
      int32_t* where = argmax + (group + g) * width;
      largest_rows(x, tile.x_stride, count, width, best);
      for (int64_t c = 0; c < width; c++) {
        int64_t k = 0;
        while (k < count - 1 && x[k * tile.x_stride + c] != best[c]) k++;
        where[c] = static_cast<int32_t>(k);
      }
    }
  }
}

void out_sums(const TrainedRows& args, const TrainedUnit& unit, const RowGradient& du, const OutSums& sums,
              float* scratch, int64_t begin, int64_t end) {
  Tile tile = make_tile(args, scratch);
  const int64_t hidden = unit.hidden, stride = packed_columns(hidden);
  for (int64_t group = begin; group < end; group += tile.groups) {
    move(&tile, args, group, end);
    load_hidden(args, tile, unit, tile.h);
    each_entry(args, tile, du, [&](int64_t row, int64_t c, float grad) {
      const float* h = tile.h + row * tile.h_stride;
      const float value = dot(sums.weight + c * hidden, h, hidden) + sums.bias[c];
      sums.grad[c] += grad;
      sums.grad_normed[c] += grad * ((value - sums.mean[c]) * sums.deviation[c]);
      add_scaled(grad, h, hidden, sums.outer + c * stride);
    });
  }
}

void hidden_grad(const TrainedRows& args, const TrainedUnit& unit, const RowGradient& du,
                 const PackedLinear& q, const float* weight, const PackedLinear& out, const InNorm& norm,
                 float* dz, float* sum, float* sum_normed, float* scratch, int64_t begin, int64_t end) {
  Tile tile = make_tile(args, scratch);
  const int64_t hidden = unit.hidden, width = args.from.width;
  for (int64_t group = begin; group < end; group += tile.groups) {
    move(&tile, args, group, end);
    load_hidden(args, tile, unit, tile.h);
    layer<Into::store>(tile.h, tile.h_stride, q, hidden, hidden, tile.z, tile.h_stride, tile.rows);
    if (du.dense) {
      load_rows(tile, du.dense + first_row(args, tile) * width, width, tile.x, tile.x_stride);
      layer<Into::add>(tile.x, tile.x_stride, out, width, hidden, tile.z, tile.h_stride, tile.rows);
    } else {
      each_entry(args, tile, du, [&](int64_t row, int64_t c, float grad) {
        add_scaled(grad, weight + c * hidden, hidden, tile.z + row * tile.h_stride);
      });
    }
    const float* before = unit.before + first_row(args, tile) * hidden;
    float* to = dz + first_row(args, tile) * hidden;
    int64_t j = 0;
    for (; j + kLanes <= hidden; j += kLanes) {
      Float total = load(sum + j), normed = load(sum_normed + j);
      const Float mean = load(norm.mean + j), deviation = load(norm.deviation + j);
      for (int64_t r = 0; r < tile.used; r++) {
        const int64_t at = r * tile.h_stride + j;
        const Float grad = where_positive(load(tile.h + at), load(tile.z + at));
        store(to + r * hidden + j, grad);
        total = add(total, grad);
        normed = fma(grad, mul(sub(load(before + r * hidden + j), mean), deviation), normed);
      }
      store(sum + j, total);
      store(sum_normed + j, normed);
    }
    for (; j < hidden; j++) {
      for (int64_t r = 0; r < tile.used; r++) {
        const int64_t at = r * tile.h_stride + j;
        const float grad = tile.h[at] > 0 ? tile.z[at] : 0.0f;
        to[r * hidden + j] = grad;
        sum[j] += grad;
        sum_normed[j] += grad * ((before[r * hidden + j] - norm.mean[j]) * norm.deviation[j]);
      }
    }
  }
}

void rows_grad(const TrainedRows& args, const TrainedUnit& unit, const RowGradient& du, const float* dz,
               const InNorm& norm, const RowsGradOut& to, float* scratch, int64_t begin, int64_t end) {
  Tile tile = make_tile(args, scratch);
  const int64_t hidden = unit.hidden, width = args.from.width, half = width / 2;
  const int64_t count = args.from.neighbors;
  for (int64_t group = begin; group < end; group += tile.groups) {
    move(&tile, args, group, end);
    load_x(args, tile);
    const int64_t row = first_row(args, tile);
    for (int64_t r = 0; r < tile.used; r++) {
      const float* grad = dz + (row + r) * hidden;
      const float* before = unit.before + (row + r) * hidden;
      float* z = tile.z + r * tile.h_stride;
      for (int64_t j = 0; j < hidden; j++) {
        const float normed = (before[j] - norm.mean[j]) * norm.deviation[j];
        z[j] = norm.factor[j] * (grad[j] - norm.m1[j] - normed * norm.m2[j]);
      }
    }
    add_outer(tile.z, tile.h_stride, hidden, tile.x, tile.x_stride, width, tile.used, to.weight_grad);

    if (args.done_count > 0) {
      const TrainedUnit& last = args.done[args.done_count - 1];
      layer<Into::store>(tile.z, tile.h_stride, *to.in, hidden, width, tile.y, tile.x_stride, tile.rows);
      if (du.dense) {
        for (int64_t r = 0; r < tile.used; r++) {
          add_scaled(1.0f, du.dense + (row + r) * width, width, tile.y + r * tile.x_stride);
        }
      } else {
        each_entry(args, tile, du,
                   [&](int64_t r, int64_t c, float grad) { tile.y[r * tile.x_stride + c] += grad; });
      }
      for (int64_t r = 0; r < tile.used; r++) {
        float* y = tile.y + r * tile.x_stride;
        const float* x = tile.x + r * tile.x_stride;
        for (int64_t c = 0; c < width; c++) y[c] = x[c] > 0 ? y[c] : 0.0f;
        memcpy(to.du + (row + r) * width, y, sizeof(float) * width);
      }
      // x is no longer needed: it takes the product that the last unit normalised.
      load_hidden(args, tile, last, tile.h);
      layer<Into::store>(tile.h, tile.h_stride, to.sums->out, last.hidden, width, tile.x, tile.x_stride,
                         tile.rows);
      add_out_sums(tile, tile.y, tile.x, tile.h, width, last.hidden, *to.sums);
      continue;
    }

    for (int64_t r = 0; r < tile.used; r++) {
      const int64_t g = tile.first + r / count, cloud = g / args.from.centers * args.from.rows;
      const int64_t middle = args.from.center[g], near = args.from.neighbor[g * count + r % count];
      const int64_t point = near < 0 ? middle : near;
      const float* z = tile.z + r * tile.h_stride;
      if (point >= 0) add_scaled(1.0f, z, hidden, to.by_neighbor + (cloud + point) * hidden);
      if (middle >= 0) add_scaled(1.0f, z, hidden, to.by_center + (cloud + middle) * hidden);
      if (du.dense) {
        const float* grad = du.dense + (row + r) * width;
        if (point >= 0) add_scaled(1.0f, grad, half, to.features + (cloud + point) * half);
        if (middle >= 0) add_scaled(1.0f, grad + half, half, to.features + (cloud + middle) * half);
      }
    }
    if (!du.dense) {
      each_entry(args, tile, du, [&](int64_t r, int64_t c, float grad) {
        const int64_t g = tile.first + r / count, cloud = g / args.from.centers * args.from.rows;
        const int64_t middle = args.from.center[g], near = args.from.neighbor[row + r];
        const int64_t point = c < half && near >= 0 ? near : middle;
        if (point >= 0) to.features[(cloud + point) * half + (c < half ? c : c - half)] += grad;
      });
    }
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
