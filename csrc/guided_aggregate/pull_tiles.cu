// Rows pooled again, activated, and how the gradient pulls at the views of every token, by tiles of 16 rows
// (tiles.cuh). A block takes a cloud and 64 channels, a warp a tile:
//
// - rows are products of the membership with the tokens, and of inner with the projection as in
//   pool_matrix.cu; they wait normalised for the passes to come,
// - activated they stay where they are, as two numbers of 16 bits that add up to them, and are multiplied by
//   the gradient of the tile's tokens. Of a token's products, that with its own row is kept.
//
// More blocks take the voxels.
#include "guided_aggregate/tiles.cuh"
#include <algorithm>

#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kPullTileWarps = 9;  // of a block: three views of three tiles
constexpr int kBlock = kPullTileWarps * kWarp;
constexpr int kStretch = 2;  // voxels of a warp
constexpr int kVoxelSlice = 8 * kWarp;

// Offsets into the shared memory of a block, which begins where 128 bytes do.
struct Layout {
  int grad, x;    // 16 bits [kTokens, kSlice]
  int proj;       // 16 bits [V, 2, kFactors, kSlice]: rounded, and what rounding left
  int constants;  // float4 [V, kSlice]: mean, deviation, weight, bias
  int places;     // Places [V]
  int held;       // int [V]
  int pulls;      // float [V, kTokens]: by place
  int bytes = 0;

  __host__ __device__ explicit Layout(const Guided& args) {
    const int views = static_cast<int>(args.views);
    grad = take(2 * kTokens * kSlice);
    x = take(2 * kTokens * kSlice);
    proj = take(4 * views * kFactors * kSlice);
    constants = take(16 * views * kSlice);
    places = take(static_cast<int>(sizeof(Places)) * views);
    held = take(4 * views);
    pulls = take(4 * views * kTokens);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// Rows of voxels. A warp takes them one after the other, a lane eight channels.
template <typename T>
__device__ void activate_voxels(const GuidedBackward& args, const GradientWork& work) {
  const int lane = threadIdx.x % kWarp, slices = slices_of(args, kVoxelSlice);
  const int block = ((blockIdx.z - 1) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int rows = static_cast<int>(args.clouds * args.tokens), channels = static_cast<int>(args.channels);
  const int layer = static_cast<int>(args.views), c = block % slices * kVoxelSlice + 8 * lane;
  const int first = (block / slices * kPullTileWarps + threadIdx.x / kWarp) * kStretch;
  if (c >= channels) return;
  const int32_t *order = args.order + int64_t(layer) * rows,
                *start = args.start + int64_t(layer) * (rows + 1);
  const T* const x = static_cast<const T*>(args.features) + c;
  Half* const normed = static_cast<Half*>(work.voxels) + c;
  Half* const space = static_cast<Half*>(work.space) + c;
  for (int voxel = first; voxel < min(first + kStretch, rows); voxel++) {
    const int begin = start[voxel], end = start[voxel + 1];
    if (begin == end) continue;
    Lane<8> sum = zero<8>(), most;
    for (int p = begin; p < end; p += 2) {
      Lane<8> value[2];
#pragma unroll
      for (int j = 0; j < 2; j++) value[j] = load<8>(x + order[min(p + j, end - 1)] * channels);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (p + j == end) break;
        add(&sum, 1.0f, value[j]);
#pragma unroll
        for (int n = 0; n < 8; n++) {
          if (p + j == begin || exceeds(value[j].at[n], most.at[n])) most.at[n] = value[j].at[n];
        }
      }
    }
    const float share = reciprocal(float(end - begin));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Activation<T, 4, false> activation(args, args.mean, args.deviation, layer, c + 4 * h);
      Lane<4> row, s;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        row.at[n] = activation.normed(n, fmaf(sum.at[4 * h + n], share, most.at[4 * h + n]));
        s.at[n] = activation(n, row.at[n]).value;
      }
      keep(normed + voxel * channels + 4 * h, row);
      keep(space + voxel * channels + 4 * h, s);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 3) pull_tiles_kernel(GuidedBackward args, GradientWork work) {
  if (blockIdx.z > 0) return activate_voxels<T>(args, work);
  extern __shared__ __align__(128) char shared[];
  const Layout layout(args);
  uint16_t* const grad = reinterpret_cast<uint16_t*>(shared + layout.grad);
  uint16_t* const x = reinterpret_cast<uint16_t*>(shared + layout.x);
  uint16_t* const proj = reinterpret_cast<uint16_t*>(shared + layout.proj);
  float4* const constants = reinterpret_cast<float4*>(shared + layout.constants);
  Places* const places = reinterpret_cast<Places*>(shared + layout.places);
  int32_t* const held = reinterpret_cast<int32_t*>(shared + layout.held);
  float* const all_pulls = reinterpret_cast<float*>(shared + layout.pulls);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, q = lane % 4;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), slice = blockIdx.y * kSlice;
  const int inner = static_cast<int>(args.inner), pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const T* const all_grad = static_cast<const T*>(args.grad) + base * channels + slice;
  const T* const all_x = static_cast<const T*>(args.features) + base * channels + slice;
  for (int i = threadIdx.x; i < kTokens * (kSlice / 8); i += kBlock) {
    const int token = i / (kSlice / 8), eight = i % (kSlice / 8), to = at_row(token, eight);
    const bool inside = token < tokens && slice + 8 * eight < channels;
    const int from = inside ? token * channels + 8 * eight : 0;
    copy_async<16>(x + to, all_x + from, inside);
    copy_async<16>(grad + to, all_grad + from, inside);
  }
  copy_commit();
  load_places(args, places, nullptr, held);
  in_batches<6>(
      views * kFactors * (kSlice / 4),
      [&](int i) {
        const int c = slice + i % (kSlice / 4) * 4, k = i / (kSlice / 4) % kFactors,
                  view = i / (kSlice / 4 * kFactors);
        const bool inside = k <= inner && c < channels;
        return inside ? load<4>(args.proj + (int64_t(view) * (inner + 1) + k) * channels + c) : zero<4>();
      },
      [&](int i, const Lane<4>& four) {
        const int c = i % (kSlice / 4) * 4, k = i / (kSlice / 4) % kFactors,
                  view = i / (kSlice / 4 * kFactors);
        uint16_t* const to = proj + view * 2 * kFactors * kSlice + at_row(k, c / 8) + c % 8;
        uint2 whole, rest;
        split_two<BFloat16>(four.at[0], four.at[1], &whole.x, &rest.x);
        split_two<BFloat16>(four.at[2], four.at[3], &whole.y, &rest.y);
        *reinterpret_cast<uint2*>(to) = whole;
        *reinterpret_cast<uint2*>(to + kFactors * kSlice) = rest;
      });
  in_batches<2>(
      views * kSlice,
      [&](int i) {
        const int c = slice + i % kSlice, at = i / kSlice * channels + c;
        if (c >= channels) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        return make_float4(args.mean[at], args.deviation[at], args.view_weight[at], args.view_bias[at]);
      },
      [&](int i, const float4& of) { constants[i] = of; });
  copy_wait<0>();
  __syncthreads();

  uint4* const waiting = static_cast<uint4*>(work.rows);
  const uint32_t ones = std::is_same_v<T, Half> ? 0x3c003c00 : 0x3f803f80;
  for (int task = warp, view = 0, before = 0;; task += kPullTileWarps) {
    while (view < views && task - before >= tiles_of(held[view])) before += tiles_of(held[view++]);
    if (view == views) break;
    const int tile = task - before, first = tile * kRowTile, row = first + g;
    const uint32_t two_row[2] = {two_rows(row), two_rows(row + 8)};
    const Places& own = places[view];
    Lane<2> heads[4];  // of rows g and g + 8
    float count[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row + 8 * i;
      const bool inside = r < held[view];
      const float* const from = args.inner_means + (view * rows + base + r) * pad + 2 * q;
      heads[i] = inside && 2 * q < pad ? load<2>(from) : zero<2>();
      heads[i + 2] = inside && 2 * q + 8 < pad ? load<2>(from + 8) : zero<2>();
      count[i] = inside ? float(own.begin[r + 1] - own.begin[r]) : 0.0f;
    }
    const int begin = own.begin[first] & ~1, end = own.begin[min(first + kRowTile, tokens)];
    float sum[2 * kPairs][4] = {};
    for (int place = begin; place < end; place += 16) {
      uint32_t member[4];
      masks_of(member, own, place + 2 * q, two_row);
#pragma unroll
      for (int i = 0; i < 4; i++) member[i] &= ones;
      multiply_rows<T, kPairs>(sum, member,
                               shared_address(x + at_row(own.token[place + lane % 16], lane / 16)));
    }
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float n = count[i % 2];
      split_two<BFloat16>(heads[i].at[0] * n, heads[i].at[1] * n, high + i, low + i);
    }
    const unsigned weights =
        shared_address(proj + view * 2 * kFactors * kSlice + at_row(lane % 16, lane / 16));
    multiply_rows<BFloat16, kPairs>(sum, high, weights + 2 * kFactors * kSlice);
    multiply_rows<BFloat16, kPairs>(sum, high, low, weights);

    uint32_t active[2][kPairs][4];  // two parts of the activations
    const float share[2] = {count[0] > 0.0f ? reciprocal(count[0]) : 0.0f,
                            count[1] > 0.0f ? reciprocal(count[1]) : 0.0f};
    uint4* const to = waiting + tile_at(args, view, tile);
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      uint32_t normed[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Lane<2> z[2], activated[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const float4 of = constants[view * kSlice + 16 * j + 8 * h + 2 * q + n];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            z[i].at[n] = (sum[2 * j + h][2 * i + n] * share[i] - of.x) * of.y;
            activated[i].at[n] = gelu_for<T>(fmaf(z[i].at[n], of.z, of.w)).value;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          normed[2 * h + i] = bounded_halves(z[i]);
          split_two<T>(activated[i].at[0], activated[i].at[1], &active[0][j][2 * h + i],
                       &active[1][j][2 * h + i]);
        }
      }
      to[j * kWarp] = make_uint4(normed[0], normed[1], normed[2], normed[3]);
    }

    float* const pulls = all_pulls + view * kTokens;
    for (int place = begin; place < end; place += 16) {
      const unsigned at =
          shared_address(grad + at_row(own.token[place + lane / 16 * 8 + lane % 8], lane / 8 % 2));
      float product[2][2][4] = {};  // of two parts
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        uint32_t b[4];
        load_matrices(b, at ^ 32 * j);
#pragma unroll
        for (int part = 1; part >= 0; part--) {
          multiply<T>(product[part][0], active[part][j], b[0], b[1]);
          multiply<T>(product[part][1], active[part][j], b[2], b[3]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const int at_place = place + 8 * h + 2 * q + n;
          const uint32_t its = own.row[at_place];
          if (its == (two_row[0] & 0xffff)) pulls[at_place] = product[1][h][n] + product[0][h][n];
          if (its == (two_row[1] & 0xffff)) pulls[at_place] = product[1][h][2 + n] + product[0][h][2 + n];
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < views * kTokens; i += kBlock) {
    const int view = i / kTokens, place = i % kTokens;
    if (place >= tokens) continue;
    float* const to = work.pulls + (int64_t(blockIdx.y) * views + view) * rows + base;
    to[places[view].token[place]] = all_pulls[i];
  }
}

}  // namespace

bool has_tiles(const Guided& args) {
  // Of fewer channels than a slice most lanes have nothing to do.
  if (args.ensemble != Ensemble::adaptive || args.channels < kSlice || !pools_by_matrix(args)) return false;
  const int64_t pull = Layout(args).bytes, rows = tile_rows_shared(args),
                products = tile_products_shared(args);
  return std::max(pull, std::max(rows, products)) <= shared_limit(kOptIn);
}

int pull_tiles(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const int64_t each = kPullTileWarps * kStretch, slices = slices_of(args, kSlice),
                layer = args.clouds * slices;
  const int64_t voxels = (args.clouds * args.tokens + each - 1) / each * slices_of(args, kVoxelSlice);
  const dim3 grid(static_cast<unsigned>(args.clouds), static_cast<unsigned>(slices),
                  static_cast<unsigned>(1 + (voxels + layer - 1) / layer));
  const int bytes = Layout(args).bytes;
  int error = 0;
  const auto launch = [&](auto type) {
    const auto kernel = pull_tiles_kernel<decltype(type)>;
    error = allow_shared(kernel, bytes);
    if (!error) kernel<<<grid, kBlock, bytes, stream>>>(args, work);
  };
  if (args.dtype == Dtype::f16) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  return error ? error : cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
