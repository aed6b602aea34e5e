// Guided aggregation backward on CUDA; kernel.h has the formulas. Rows are pooled again instead of kept.
// Then, where views are blended by how they agree with space and a slice of a cloud fits in shared memory,
// the passes of gradient.cuh: how G pulls at the views of every token (pull.cu), dy of the rows of views and
// voxels with the sums that batch normalisation's gradient needs (gradient.cu), dz and its products
// (products.cu). For 16-bit features of clouds of up to 128 tokens these go by tiles of 16 rows (tiles.cuh):
// pull_tiles.cu, that pools too, gradient_tiles.cu and product_tiles.cu. Else the walks below: a block per
// token for the factors of its views, dy, dz as what each token gets of it, its products with the projection,
// the sum over views. At last attention (attention_backward.cu); after all of it autograd takes LayerNorm and
// its product (product_backward.cu).
//
// H200, B = 32, S = 128, C = 768, V = 6, M = 12, bfloat16, 12 blocks in a CUDA graph: 2.4 ms with 39
// cells, 3.2 with 400. The floor, tokens and their gradient read and written once, is 0.05 ms. us of a block:
// dy 37 and 60, products 35 and 54, pull 35 and 50, LayerNorm and its product 28, voxels 17, attention 16 and
// 18, torch's additions 14, factors 8, sums 5. Without tiles it was 2.8 and 4.8 ms: 38 and 110 rows of a view
// and cloud hold tokens then, products of rows with all tokens of a cloud grow with the rows, and rows of all
// views did not fit in shared memory at once. Tiles whose blocks made the factors themselves, two on a
// processor, took 2.9 and 3.7 ms (dy 69 and 93 us); tiles of products with weights fetched at once, not one
// after the other, are no faster. Limit: the passes over tiles issue in 34 to 48 % of the cycles, with a
// third of the warps that fit; their shared memory is busy for 52 to 60 %, and what they wait for first is
// memory.
#include "guided_aggregate/gradient.cuh"
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kTogether = 8;  // rows of the projection at once

// Whether the passes of gradient.cuh have room.
bool is_sliced(const Guided& args) {
  if (args.ensemble != Ensemble::adaptive || args.channels % 4 != 0) return false;
  const int64_t numbers = (args.clouds * args.tokens + 1) * args.channels;
  if (args.tokens >> 15 != 0 || numbers >> 30 != 0) return false;  // places in 16 bits, offsets in 32
  const int64_t rows = rows_shared(args), products = products_shared(args);
  return (rows > products ? rows : products) <= shared_limit(kOptIn);
}

// Whether those of tiles.cuh take over.
bool is_tiled(const Guided& args) { return is_sliced(args) && has_tiles(args); }

int slices_of_products(const Guided& args) {
  if (is_sliced(args) && !args.maximum) return slices_of(args, kSlice);
  return static_cast<int>(packs(args) ? Walk<4>::slices(args) : Walk<1>::slices(args));
}

struct Workspace {
  float *z, *heads, *inner;  // as in forward; heads with maxima alone
  Factors tokens;            // grad_space: later what voxels add to dx
  float* pulls;              // as in GradientWork, and so is won
  float4* factors;
  float* bents;
  float2* pairs;
  float* gammas;
  uint8_t* won;
  float* dy;                        // [L, R, C], or in the features' 16 bits; of voxels alone beside tiles
  uint16_t* normed;                 // likewise rows, if they wait in 16 bits
  uint4 *tiles, *tile_dy, *tables;  // rows and dy of views, in tiles
  float2* parts;                    // [B, L, C]: sums of dy and of dy z^
  float2* voxel_parts;              // [voxel_parts, C]: of voxels, if sliced
  float2* sums;                     // [L, C]: their means over all rows
  float* grads;                     // [V, R, C]: dz per token of a segment, or by token with maxima
  float* grad_parts;                // [slices, V, R, K]
  char* attention;
  float* proj_parts;  // [B, V, M + 1, C]
  int64_t bytes;

  Workspace(const Guided& args, void* memory) {
    Room room(memory);
    const int64_t rows = args.clouds * args.tokens, pad = coefficients(args.inner);
    const bool adaptive = args.ensemble == Ensemble::adaptive, sliced = is_sliced(args);
    const bool tiled = is_tiled(args), walked = sliced && !tiled;
    z = room.take<float>(tiled ? 0 : args.layers * rows * args.channels);
    heads = room.take<float>(args.maximum ? args.views * rows * pad : 0);
    inner = room.take<float>(args.maximum ? args.views * rows * pad : 0);
    tokens.factors = room.take<float>(sliced ? 0 : 3 * args.views * rows);
    tokens.space = room.take<float>(adaptive ? (rows + 1) * args.channels : 0);  // or in 16 bits
    tokens.grad_space = room.take<float>(adaptive ? rows * args.channels : 0);
    tokens.shares = room.take<float>(args.ensemble == Ensemble::max ? args.views * rows * args.channels : 0);
    const int pulled = tiled ? slices_of(args, kSlice) : pull_slices(args);
    pulls = room.take<float>(sliced ? pulled * args.views * rows : 0);
    factors = room.take<float4>(walked ? args.views * rows : 0);
    pairs = room.take<float2>(walked ? args.views * rows : 0);
    bents = room.take<float>(walked ? args.views * rows : 0);
    gammas = room.take<float>(walked ? rows : 0);
    won = room.take<uint8_t>(sliced ? rows * eights_of(args) : 0);
    const bool narrow = sliced && is_narrow(args);
    const int64_t numbers = (tiled ? 1 : args.layers) * rows * args.channels;
    dy = room.take<float>(narrow ? (numbers + 1) / 2 : numbers);
    normed = room.take<uint16_t>(narrow ? numbers : 0);
    const int64_t words = tiled ? tile_words(args) : 0;
    tiles = room.take<uint4>(words);
    tile_dy = room.take<uint4>(words);
    tables = room.take<uint4>(tiled ? tile_tables(args) / 16 : 0);
    parts = room.take<float2>(args.clouds * args.layers * args.channels);
    voxel_parts = room.take<float2>(sliced ? guided::voxel_parts(args) * args.channels : 0);
    sums = room.take<float2>(args.layers * args.channels);
    grads = args.maximum ? room.take<float>(args.views * rows * args.channels) : dy;
    grad_parts = room.take<float>(slices_of_products(args) * args.views * rows * pad);
    attention = room.take<char>(attention_backward_workspace(args));
    proj_parts = room.take<float>(args.clouds * args.views * (args.inner + 1) * args.channels);
    bytes = room.used;
  }
  GradientWork sliced(const Guided& args) const {
    GradientWork work{};
    work.z = z;
    work.pulls = pulls;
    work.space = tokens.space;
    work.tokens = factors;
    work.bents = bents;
    work.pairs = pairs;
    work.gammas = gammas;
    work.grad_space = tokens.grad_space;
    work.parts = parts;
    work.sums = sums;
    work.voxel_parts = voxel_parts;
    work.tables = tables;
    work.won = won;
    work.grad_parts = grad_parts;
    work.proj_parts = proj_parts;
    if (is_tiled(args)) {
      work.rows = tiles;
      work.dy = tile_dy;
      work.voxels = normed;
      work.voxel_dy = dy;
      return work;
    }
    const bool narrow = is_narrow(args);
    const int64_t views = args.views * args.clouds * args.tokens * args.channels * (narrow ? 2 : 4);
    work.rows = narrow ? static_cast<void*>(normed) : z;
    work.dy = dy;
    work.voxels = static_cast<char*>(work.rows) + views;
    work.voxel_dy = static_cast<char*>(work.dy) + views;
    return work;
  }
};

// dy of every segment and its sums.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) segments_kernel(GuidedBackward args, Workspace work) {
  extern __shared__ float4 room[];
  float* shared = reinterpret_cast<float*>(room);
  const Walk<N> walk(args);
  const int lane = walk.lane, group = static_cast<int>(args.layers < kGroup ? args.layers : kGroup);
  const int64_t rows = walk.rows, channels = args.channels, c = walk.active ? walk.c : 0;
  const T* grad = static_cast<const T*>(args.grad) + c;
  const bool adaptive = args.ensemble == Ensemble::adaptive;
  float2* kept = reinterpret_cast<float2*>(shared);
  Lane<N> plain = zero<N>(), scaled = zero<N>();

  const auto tile = [&](int64_t layer, int64_t first, int64_t end) {
    const bool voxels = layer == args.views;
    const int32_t* start = args.start + layer * (rows + 1);
    const int32_t* order = args.order + layer * rows;
    const float* factors = work.tokens.factors + layer * rows;
    Lane<N> z[kTile];
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      const int64_t segment = first + j < end ? first + j : first;
      const bool some = start[segment] < start[segment + 1];
      z[j] = some ? load<N>(work.z + (layer * rows + segment) * channels + c) : zero<N>();
    }
    const Norm<N> norm(args, args.mean, args.deviation, layer, c);
    const Lane<N> center = load<N>(args.mean + layer * channels + c);
    const Lane<N> inverse = load<N>(args.deviation + layer * channels + c);
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      const int64_t segment = first + j;
      if (segment >= end) break;
      const Tokens tokens{order, start[segment], start[segment + 1], lane};
      if (tokens.begin == tokens.end) continue;
      Lane<N> dg = zero<N>();
      float of_grad = 0.0f, of_space = 0.0f, of_own = 0.0f;
      if (voxels) {
        tokens.each([](int32_t, bool) {},
                    [&](int, int32_t token) {
                      add(&dg, 1.0f, load<N>(work.tokens.grad_space + token * channels + c));
                    });
      } else {
        tokens.each(
            [&](int32_t token, bool mine) {
              of_grad = mine ? factors[token] : 0.0f;
              of_space = mine ? factors[args.views * rows + token] : 0.0f;
              of_own += mine ? factors[2 * args.views * rows + token] : 0.0f;
            },
            [&](int i, int32_t token) {
              Lane<N> d = load<N>(grad + token * channels);
              if (args.ensemble == Ensemble::max) {
                const int64_t row = layer * rows + token;
                const Lane<N> share = load<N>(work.tokens.shares + row * channels + c);
#pragma unroll
                for (int n = 0; n < N; n++) d.at[n] *= share.at[n];
              }
              add(&dg, __shfl_sync(kAll, of_grad, i), d);
              if (adaptive) {
                add(&dg, __shfl_sync(kAll, of_space, i), load<N>(work.tokens.space + token * channels + c));
              }
            });
        of_own = sum_of_warp(of_own);
      }
      Lane<N> dy;
#pragma unroll
      for (int n = 0; n < N; n++) {
        const Gelu g = gelu(norm(n, z[j].at[n]));
        dy.at[n] = fmaf(of_own, g.value, dg.at[n]) * g.slope;
        plain.at[n] += dy.at[n];
        scaled.at[n] = fmaf(dy.at[n], (z[j].at[n] - center.at[n]) * inverse.at[n], scaled.at[n]);
      }
      if (walk.active) store(work.dy + (layer * rows + segment) * channels + c, dy);
    }
  };
  const auto flush = [&](int64_t layer) {
    const int place = (walk.warp * group + static_cast<int>(layer % kGroup)) * kWarp + lane;
#pragma unroll
    for (int n = 0; n < N; n++) kept[place * N + n] = make_float2(plain.at[n], scaled.at[n]);
    plain = scaled = zero<N>();
  };
  const auto merge = [&](int64_t layer, int64_t last) {
    const int width = kWarp * N;
    for (int i = threadIdx.x; i < (last - layer) * width; i += kThreads) {
      const int l = i / width, column = i % width;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int w = 0; w < kWarps; w++) {
        const float2 part = kept[(w * group + l) * width + column];
        sum.x += part.x;
        sum.y += part.y;
      }
      const int64_t channel = int64_t(blockIdx.y) * width + column;
      if (channel < channels) work.parts[(walk.cloud * args.layers + layer + l) * channels + channel] = sum;
    }
  };
  walk.run(tile, flush, merge);
}

// Sums over the clouds in float64, and their means over the rows: 32 columns of 8 threads.
__global__ void __launch_bounds__(kThreads)
    sums_kernel(GuidedBackward args, Workspace work, int64_t of_voxels) {  // parts
  __shared__ double shared[3][kWarps][kWarp];
  const int64_t columns = args.layers * args.channels, split = args.views * args.channels;
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t own = int64_t(blockIdx.x) * kWarp + lane, i = own < columns ? own : columns - 1;
  double plain = 0.0, scaled = 0.0, rows = 0.0;
  const bool apart = of_voxels > 0 && i >= split;
  const float2* const parts = apart ? work.voxel_parts + (i - split) : work.parts + i;
  const int64_t count = apart ? of_voxels : args.clouds, stride = apart ? args.channels : columns;
#pragma unroll 8
  for (int64_t p = group; p < count; p += kWarps) {
    const float2 part = parts[p * stride];
    plain += part.x;
    scaled += part.y;
  }
  for (int64_t p = group; p < args.clouds; p += kWarps) {
    rows += args.count[i / args.channels * args.clouds + p];
  }
  shared[0][group][lane] = plain;
  shared[1][group][lane] = scaled;
  shared[2][group][lane] = rows;
  __syncthreads();
  if (group > 0 || own >= columns) return;
  plain = scaled = rows = 0.0;
  for (int g = 0; g < kWarps; g++) {
    plain += shared[0][g][lane];
    scaled += shared[1][g][lane];
    rows += shared[2][g][lane];
  }
  (i < split ? args.grad_view_weight + i : args.grad_space_weight + (i - split))[0] = float(scaled);
  (i < split ? args.grad_view_bias + i : args.grad_space_bias + (i - split))[0] = float(plain);
  if (args.total > 0 && i < split) rows = double(args.total);
  if (rows < 1.0) rows = 1.0;
  work.sums[i] =
      args.training ? make_float2(float(plain / rows), float(scaled / rows)) : make_float2(0.0f, 0.0f);
}

// dz of one segment.
template <int N>
struct SegmentGradient {
  Lane<N> factor, center, inverse, plain, scaled;

  __device__ SegmentGradient(const GuidedBackward& args, const Workspace& work, int64_t layer, int64_t c) {
    const int64_t at = layer * args.channels + c;
    const float* weight = layer == args.views ? args.space_weight : args.view_weight + layer * args.channels;
    const Lane<N> weights = load<N>(weight + c);
    center = load<N>(args.mean + at);
    inverse = load<N>(args.deviation + at);
#pragma unroll
    for (int n = 0; n < N; n++) {
      factor.at[n] = weights.at[n] * inverse.at[n];
      plain.at[n] = work.sums[at + n].x;
      scaled.at[n] = work.sums[at + n].y;
    }
  }
  __device__ Lane<N> operator()(const Lane<N>& dy, const Lane<N>& z) const {
    Lane<N> dz;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float normed = (z.at[n] - center.at[n]) * inverse.at[n];
      dz.at[n] = factor.at[n] * (dy.at[n] - plain.at[n] - normed * scaled.at[n]);
    }
    return dz;
  }
};

// What a voxel gives each of its tokens: a share of its mean, and to the lowest largest one the maximum's.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) voxels_kernel(GuidedBackward args, Workspace work) {
  const int64_t rows = args.clouds * args.tokens, channels = args.channels, layer = args.views;
  const int64_t segment = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t own = (int64_t(blockIdx.y) * kWarp + lane) * N, c = own < channels ? own : 0;
  if (segment >= rows) return;
  const int32_t* start = args.start + layer * (rows + 1);
  const Tokens tokens{args.order + layer * rows, start[segment], start[segment + 1], lane};
  if (tokens.begin == tokens.end) return;
  const T* x = static_cast<const T*>(args.features) + c;
  const int64_t at = (layer * rows + segment) * channels + c;
  const SegmentGradient<N> gradient(args, work, layer, c);
  const Lane<N> dz = gradient(load<N>(work.dy + at), load<N>(work.z + at));
  Lane<N> most = zero<N>();
  int32_t first[N];
#pragma unroll
  for (int n = 0; n < N; n++) first[n] = -1;
  tokens.each([](int32_t, bool) {},
              [&](int, int32_t token) {
                const Lane<N> value = load<N>(x + token * channels);
#pragma unroll
                for (int n = 0; n < N; n++) {
                  if (first[n] >= 0 && !exceeds(value.at[n], most.at[n])) continue;
                  most.at[n] = value.at[n];
                  first[n] = token;
                }
              });
  const float count = float(tokens.end - tokens.begin);
  tokens.each([](int32_t, bool) {},
              [&](int, int32_t token) {
                Lane<N> share;
#pragma unroll
                for (int n = 0; n < N; n++) {
                  share.at[n] = dz.at[n] / count + (first[n] == token ? dz.at[n] : 0.0f);
                }
                if (own < channels) store(work.tokens.grad_space + token * channels + c, share);
              });
}

// A block per slice of channels and cloud. First what the cells of each view give their tokens, then its
// products with the projection and with the heads.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) cells_kernel(GuidedBackward args, Workspace work) {
  extern __shared__ float4 room[];  // [warps, kTogether, channels of the slice]
  float* shared = reinterpret_cast<float*>(room);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t rows = args.clouds * args.tokens, channels = args.channels, cloud = blockIdx.x;
  const int64_t own = (int64_t(blockIdx.y) * kWarp + lane) * N, c = own < channels ? own : 0;
  const bool active = own < channels;
  const int64_t base = cloud * args.tokens;
  const int pad = static_cast<int>(coefficients(args.inner)), inner = static_cast<int>(args.inner);
  const T* x = static_cast<const T*>(args.features) + c;
  for (int64_t view = 0; view < args.views; view++) {
    const int64_t held = args.count[view * args.clouds + cloud], layer = view * rows;
    const int32_t* start = args.start + view * (rows + 1);
    const float* proj = args.proj + view * (inner + 1) * channels + c;
    const SegmentGradient<N> gradient(args, work, view, c);
    for (int64_t segment = base + warp; args.maximum && segment < base + held; segment += kWarps) {
      const Tokens tokens{args.order + layer, start[segment], start[segment + 1], lane};
      const int64_t at = (layer + segment) * channels + c;
      Lane<N> dz = gradient(load<N>(work.dy + at), load<N>(work.z + at));
      Lane<N> share;
      const float count = float(tokens.end - tokens.begin);
#pragma unroll
      for (int n = 0; n < N; n++) share.at[n] = dz.at[n] / count;
      Lane<N> most = zero<N>();
      int32_t first[N];
#pragma unroll
      for (int n = 0; n < N; n++) first[n] = -1;
      for (int32_t i = tokens.begin; i < tokens.end; i += kTile) {
        Lane<N> value[kTile];
        const float* coefficient[kTile];
        int32_t token[kTile];
#pragma unroll
        for (int t = 0; t < kTile; t++) {
          token[t] = tokens.order[i + t < tokens.end ? i + t : i];
          value[t] = load<N>(x + token[t] * channels);
          coefficient[t] = work.heads + (layer + token[t]) * pad;
        }
        project(value, coefficient, proj, inner, channels);
#pragma unroll
        for (int t = 0; t < kTile; t++) {
          if (i + t >= tokens.end) continue;
#pragma unroll
          for (int n = 0; n < N; n++) {
            if (first[n] >= 0 && !exceeds(value[t].at[n], most.at[n])) continue;
            most.at[n] = value[t].at[n];
            first[n] = token[t];
          }
        }
      }
      tokens.each([](int32_t, bool) {},
                  [&](int, int32_t token) {
                    Lane<N> part = share;
#pragma unroll
                    for (int n = 0; n < N; n++) part.at[n] += first[n] == token ? dz.at[n] : 0.0f;
                    if (active) store(work.grads + (layer + token) * channels + c, part);
                  });
    }
    if (args.maximum) __syncthreads();
    const int64_t last = base + (args.maximum ? args.tokens : held);
    for (int begin = 0; begin <= inner; begin += kTogether) {
      Lane<N> sum[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; k++) sum[k] = zero<N>();
      // Rows of the means are made on the way; those of maxima, and all for later columns, are there.
      const bool make = !args.maximum && begin == 0;
      const float* const dys = make ? work.dy : work.grads;
      Lane<N> next = zero<N>(), next_z = zero<N>();
      const auto fetch = [&](int64_t row) {
        if (row >= last) return;
        next = load<N>(dys + (layer + row) * channels + c);
        if (make) next_z = load<N>(work.z + (layer + row) * channels + c);
      };
      fetch(base + warp);
      for (int64_t row = base + warp; row < last; row += kWarps) {
        const float count = args.maximum ? 1.0f : float(start[row + 1] - start[row]);
        Lane<N> d = next;
        if (make) {
          d = gradient(next, next_z);
#pragma unroll
          for (int n = 0; n < N; n++) d.at[n] /= count;
        }
        fetch(row + kWarps);
        if (make && active) store(work.grads + (layer + row) * channels + c, d);
        if (!active) d = zero<N>();
        const float* from = (args.maximum ? work.heads : args.inner_means) + (layer + row) * pad;
        float product[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; k++) {
          const bool inside = begin + k <= inner;
          const Lane<N> w = load<N>(proj + min(begin + k, inner) * channels);
          const float coefficient = inside ? from[min(begin + k, inner)] * count : 0.0f;
          product[k] = 0.0f;
#pragma unroll
          for (int n = 0; n < N; n++) product[k] = fmaf(w.at[n], d.at[n], product[k]);
          add(&sum[k], coefficient, d);
        }
        const float total = sums_of_warp(product, lane);
        constexpr int kEach = kWarp / kTogether;
        if (lane % kEach == 0 && begin + lane / kEach < pad) {
          const int64_t at = (int64_t(blockIdx.y) * args.views * rows + layer + row) * pad;
          work.grad_parts[at + begin + lane / kEach] = total;
        }
      }
      constexpr int kWidth = kWarp * N;
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTogether; k++) store(shared + ((warp * kTogether + k) * kWarp + lane) * N, sum[k]);
      __syncthreads();
      for (int i = threadIdx.x; i < kTogether * kWidth; i += kThreads) {
        const int k = begin + i / kWidth;
        const int64_t channel = int64_t(blockIdx.y) * kWidth + i % kWidth;
        if (k > inner || channel >= channels) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) total += shared[w * kTogether * kWidth + i];
        work.proj_parts[((cloud * args.views + view) * (inner + 1) + k) * channels + channel] = total;
      }
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) features_kernel(GuidedBackward args, Workspace work) {
  const int64_t rows = args.clouds * args.tokens, columns = args.channels / N;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t token = i / columns, c = i % columns * N, at = token * args.channels + c;
  Lane<N> sum{};
  if (args.residual) sum = load<N>(static_cast<const T*>(args.grad) + at);
  for (int64_t v = 0; v < args.views; v++) {
    const int64_t row = args.maximum ? token : args.segment[v * rows + token];
    add(&sum, 1.0f, load<N>(work.grads + (v * rows + row) * args.channels + c));
  }
  if (args.ensemble == Ensemble::adaptive && args.segment[args.views * rows + token] >= 0) {
    add(&sum, 1.0f, load<N>(work.tokens.grad_space + at));
  }
  store(static_cast<T*>(args.grad_features) + at, sum);
}

int blocks_of(int64_t items) { return static_cast<int>((items + kThreads - 1) / kThreads); }

template <typename T, int N>
int walk_segments(const GuidedBackward& args, const Workspace& work, cudaStream_t stream) {
  const int shared = walk_shared<N>(args);
  if (const int error = allow_shared(segments_kernel<T, N>, shared)) return error;
  segments_kernel<T, N><<<Walk<N>::grid(args), kThreads, shared, stream>>>(args, work);
  return cudaGetLastError();
}

template <typename T, int N>
int backward(const GuidedBackward& args, const Workspace& work, cudaStream_t stream) {
  const int64_t rows = args.clouds * args.tokens;
  if (rows == 0) {
    const int64_t column = args.channels * int64_t(sizeof(float)), of_views = args.views * column;
    cudaMemsetAsync(args.grad_proj, 0, of_views * (args.inner + 1), stream);
    cudaMemsetAsync(args.grad_view_weight, 0, of_views, stream);
    cudaMemsetAsync(args.grad_view_bias, 0, of_views, stream);
    if (args.layers == args.views) return cudaGetLastError();
    cudaMemsetAsync(args.grad_space_weight, 0, column, stream);
    return cudaMemsetAsync(args.grad_space_bias, 0, column, stream);
  }
  const dim3 grid = Walk<N>::grid(args);
  if (args.maximum) {
    if (const int error = attention_forward(args, work.heads, work.inner, stream)) return error;
  }
  const bool sliced = is_sliced(args), tiled = is_tiled(args);
  if (!tiled) {
    const Rows rows_args{work.heads, args.inner_means, work.z, nullptr};
    if (const int error = pool_rows(args, rows_args, false, stream)) return error;
  }
  const GradientWork passes = work.sliced(args);
  if (tiled) {
    if (const int error = pull_tiles(args, passes, stream)) return error;
    if (const int error = tile_gradients(args, passes, stream)) return error;
    if (const int error = voxel_gradients(args, passes, stream)) return error;
  } else if (sliced) {
    if (const int error = pull_views(args, passes, stream)) return error;
    if (const int error = row_gradients(args, passes, stream)) return error;
  } else {
    if (const int error = token_factors(args, work.z, work.tokens, stream)) return error;
    if (const int error = walk_segments<T, N>(args, work, stream)) return error;
  }
  sums_kernel<<<static_cast<int>((args.layers * args.channels + kWarp - 1) / kWarp), kThreads, 0, stream>>>(
      args, work, sliced ? voxel_parts(args) : 0);
  if (tiled) {
    if (const int error = tile_products(args, passes, stream)) return error;
  } else if (sliced && !args.maximum) {
    if (const int error = row_products(args, passes, stream)) return error;
  } else {
    if (args.ensemble == Ensemble::adaptive) {
      const dim3 blocks(static_cast<unsigned>((rows + kWarps - 1) / kWarps), grid.y);
      voxels_kernel<T, N><<<blocks, kThreads, 0, stream>>>(args, work);
    }
    const int products = kWarps * kTogether * kWarp * N * static_cast<int>(sizeof(float));
    const dim3 blocks(static_cast<unsigned>(args.clouds), grid.y);
    cells_kernel<T, N><<<blocks, kThreads, products, stream>>>(args, work);
    features_kernel<T, N><<<blocks_of(rows * args.channels / N), kThreads, 0, stream>>>(args, work);
  }
  return attention_backward(args, work.grad_parts, slices_of_products(args), args.maximum, work.proj_parts,
                            work.attention, stream);
}

}  // namespace
}  // namespace guided

int64_t guided_backward_workspace(const Guided& args) { return guided::Workspace(args, nullptr).bytes; }

int guided_backward_cuda(const GuidedBackward& args, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const guided::Workspace work(args, memory);
  return guided::with_packs(args, [&](auto type, auto width) {
    return guided::backward<decltype(type), decltype(width)::value>(args, work, stream);
  });
}

}  // namespace any2point
