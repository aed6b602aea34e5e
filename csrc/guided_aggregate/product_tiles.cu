// Gradients of all rows of views by tiles of 16 rows (tiles.cuh), and what follows from them: of
// the tokens by sums over views and voxels, of the heads and of the projection by products.
//
// A block takes a cloud and 64 channels. A warp takes a tile, rounds it to the features' type, multiplies it
// with the projection, which is two numbers of 16 bits that add up to it, and leaves it in shared memory.
// From there every warp collects dx of 16 tokens, and the products with inner are taken. Views whose rows do
// not fit at once are taken in turn.
#include "guided_aggregate/tiles.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kTiles = 14;  // kept at once
constexpr int kInner = kRowTile * kFactors;
constexpr int kPitch = kSlice + 8;  // of float: 8 rows lie in different banks

// Offsets into the shared memory of a block, which begins where 128 bytes do.
struct Layout {
  int kept;       // 16 bits [16 kTiles, kSlice]: dz / tokens
  int inner;      // 16 bits [kTiles, 2, kRowTile, kFactors]: n inner, its rest
  int proj;       // 16 bits [2, V, M + 1, kSlice]: rounded, and what rounding left
  int constants;  // float4 [V, kSlice]: factor, mean of dy, slope
  int tables;     // from the places on
  int voxels;     // int [kTokens]
  int shares;     // float [kTokens]: 1 / tokens of the voxel
  int bytes = 0;

  __host__ __device__ explicit Layout(const Guided& args) {
    const int views = static_cast<int>(args.views);
    kept = take(2 * kTiles * kRowTile * kSlice);
    inner = take(4 * kTiles * kInner);
    proj = take(4 * views * static_cast<int>(args.inner + 1) * kSlice);
    constants = take(16 * views * kSlice);
    const Tables all(args.views);
    tables = take(all.bytes - all.places);
    voxels = take(4 * kTokens);
    shares = take(4 * kTokens);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};
static_assert(2 * kTiles * kRowTile * kSlice + 4 * kTiles * kInner >= 4 * kTokens * kPitch, "room for dx");

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) product_tiles_kernel(GuidedBackward args, GradientWork work) {
  extern __shared__ __align__(128) char shared[];
  const Layout layout(args);
  uint16_t* const kept = reinterpret_cast<uint16_t*>(shared + layout.kept);
  uint16_t* const inners = reinterpret_cast<uint16_t*>(shared + layout.inner);
  uint16_t* const proj = reinterpret_cast<uint16_t*>(shared + layout.proj);
  float4* const constants = reinterpret_cast<float4*>(shared + layout.constants);
  const Tables tables(args.views);
  const char* const table = shared + layout.tables - tables.places;
  const Places* const places = reinterpret_cast<const Places*>(table + tables.places);
  const uint8_t* const own_rows = reinterpret_cast<const uint8_t*>(table + tables.own);
  const int32_t* const held = reinterpret_cast<const int32_t*>(table + tables.held);
  const int32_t* const before = reinterpret_cast<const int32_t*>(table + tables.tiles);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, q = lane % 4;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), slice = blockIdx.y * kSlice;
  const int inner = static_cast<int>(args.inner), pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;

  const int plane = views * (inner + 1) * kSlice;
  copy_tables(shared + layout.tables, work, tables, tables.places);
  copy_commit();
  in_batches<5>(
      views * (inner + 1) * (kSlice / 4),
      [&](int i) {
        const int k = i / (kSlice / 4), c = slice + i % (kSlice / 4) * 4;
        return c < channels ? load<4>(args.proj + int64_t(k) * channels + c) : zero<4>();
      },
      [&](int i, const Lane<4>& four) {
        uint16_t* const to = proj + at_row(i / (kSlice / 4), i % (kSlice / 4) / 2) + i % 2 * 4;
        uint2 whole, rest;
        split_two<T>(four.at[0], four.at[1], &whole.x, &rest.x);
        split_two<T>(four.at[2], four.at[3], &whole.y, &rest.y);
        *reinterpret_cast<uint2*>(to) = whole;
        *reinterpret_cast<uint2*>(to + plane) = rest;
      });
  in_batches<2>(
      views * kSlice,
      [&](int i) {
        const int c = slice + i % kSlice, at = i / kSlice * channels + c;
        if (c >= channels) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float2 means = work.sums[at];
        return make_float4(args.view_weight[at] * args.deviation[at], means.x, -means.y, 0.0f);
      },
      [&](int i, const float4& of) { constants[i] = of; });
  int32_t* const voxels = reinterpret_cast<int32_t*>(shared + layout.voxels);
  float* const voxel_shares = reinterpret_cast<float*>(shared + layout.shares);
  if (threadIdx.x < tokens) {
    const int voxel = args.segment[views * rows + base + threadIdx.x];
    const int32_t* const start = args.start + views * (rows + 1) + max(voxel, 0);
    voxels[threadIdx.x] = voxel;
    voxel_shares[threadIdx.x] = 1.0f / float(start[1] - start[0]);
  }
  copy_wait<0>();
  __syncthreads();

  const uint4* const waiting = static_cast<const uint4*>(work.rows);
  const uint4* const all_dy = static_cast<const uint4*>(work.dy);
  constexpr uint32_t kOne = std::is_same_v<T, Half> ? 0x3c00 : 0x3f80;
  const uint32_t one = g / 2 == q ? kOne << g % 2 * 16 : 0;
  const uint32_t identity[4] = {one, 0, 0, one};
  float dx[2 * kPairs][4] = {};
  for (int first_view = 0, last; first_view < views; first_view = last) {
    last = last_of_tiles(before, first_view, views, kTiles);
    const int first_tile = before[first_view];
    for (int task = warp, view = first_view;; task += kTileWarps) {
      while (view < last && first_tile + task >= before[view + 1]) view++;
      if (view == last) break;
      const int tile = first_tile + task - before[view], first = tile * kRowTile;
      const int64_t at = tile_at(args, view, tile);
      uint4 normed[kPairs], dys[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        normed[j] = fetch_words(waiting + at + j * kWarp);
        dys[j] = fetch_words(all_dy + at + j * kWarp);
      }
      const int64_t layer = view * rows + base;
      const uint8_t* const begin = places[view].begin + first;
      {
        const int row = lane / 2, factor = lane % 2 * 8;
        const bool inside = first + row < held[view];
        const float* const from = args.inner_means + (layer + first + row) * pad + factor;
        const Lane<4> near = inside && factor < pad ? load<4>(from) : zero<4>();
        const Lane<4> far = inside && factor + 4 < pad ? load<4>(from + 4) : zero<4>();
        const float count = inside ? float(begin[row + 1] - begin[row]) : 0.0f;
        uint32_t whole[4], rest[4];
        split_two<T>(near.at[0] * count, near.at[1] * count, whole, rest);
        split_two<T>(near.at[2] * count, near.at[3] * count, whole + 1, rest + 1);
        split_two<T>(far.at[0] * count, far.at[1] * count, whole + 2, rest + 2);
        split_two<T>(far.at[2] * count, far.at[3] * count, whole + 3, rest + 3);
        uint16_t* const to = inners + task * 2 * kInner + row * kFactors + factor;
        *reinterpret_cast<uint4*>(to) = make_uint4(whole[0], whole[1], whole[2], whole[3]);
        *reinterpret_cast<uint4*>(to + kInner) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
      }
      float share[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = g + 8 * i;
        share[i] = first + r < held[view] ? reciprocal(float(begin[r + 1] - begin[r])) : 0.0f;
      }
      // Rows of the projection beyond the last are the last, for columns that nothing reads.
      const int column = view * (inner + 1) + min(lane / 16 * 8 + lane % 8, inner);
      const unsigned whole_at = shared_address(proj + at_row(column, lane / 8 % 2));
      const unsigned rest_at = whole_at + 2 * plane;
      float heads[2][4] = {};
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        const uint32_t z_words[4] = {normed[j].x, normed[j].y, normed[j].z, normed[j].w};
        const uint32_t dy_words[4] = {dys[j].x, dys[j].y, dys[j].z, dys[j].w};
        uint32_t rounded[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          Lane<2> dz[2];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            const float4 of = constants[view * kSlice + 16 * j + 8 * h + 2 * q + n];
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const Lane<2> z = unpack_two<Half>(z_words[2 * h + i]), dy = unpack_two<T>(dy_words[2 * h + i]);
              dz[i].at[n] = share[i] * of.x * fmaf(z.at[n], of.z, dy.at[n] - of.y);
            }
          }
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int to = at_row(task * kRowTile + g + 8 * i, 2 * j + h) + 2 * q;
            rounded[2 * h + i] = pack_two<T>(dz[i].at[0], dz[i].at[1]);
            *reinterpret_cast<uint32_t*>(kept + to) = rounded[2 * h + i];
          }
        }
        uint32_t whole[4], rest[4];
        load_matrices(whole, whole_at ^ 32 * j);
        load_matrices(rest, rest_at ^ 32 * j);
#pragma unroll
        for (int n = 0; n < 2; n++) {
          multiply<T>(heads[n], rounded, rest[2 * n], rest[2 * n + 1]);
          multiply<T>(heads[n], rounded, whole[2 * n], whole[2 * n + 1]);
        }
      }
      float* const to = work.grad_parts + (blockIdx.y * views * rows + layer + first) * pad;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int r = g + 8 * i, m = 8 * n + 2 * q;
          if (first + r < held[view] && m < pad) {
            store(to + r * pad + m, Lane<2>{{heads[n][2 * i], heads[n][2 * i + 1]}});
          }
        }
      }
    }
    __syncthreads();
    for (int view = first_view; view < last; view++) {
      const int row =
          (before[view] - first_tile) * kRowTile + own_rows[view * kTokens + 16 * warp + lane % 16];
      multiply_rows<T, kPairs>(dx, identity, shared_address(kept + at_row(row, lane / 16)));
    }
    for (int view = first_view + warp / kPairs; view < last; view += kTileWarps / kPairs) {
      const int j = warp % kPairs, first = before[view] - first_tile, tiles = before[view + 1] - before[view];
      unsigned inner_at = shared_address(inners + first * 2 * kInner + (lane / 16 * 8 + lane % 8) * kFactors +
                                         lane / 8 % 2 * 8);
      unsigned row_at = shared_address(kept + at_row(first * kRowTile + lane % 16, 2 * j + lane / 16));
      float sum[2][4] = {};
      for (int t = 0; t < tiles; t++) {
        uint32_t whole[4], rest[4], b[4];
        load_transposed(whole, inner_at);
        load_transposed(rest, inner_at + 2 * kInner);
        load_transposed(b, row_at);
        inner_at += 4 * kInner;
        row_at += 2 * kRowTile * kSlice;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          multiply<T>(sum[h], rest, b[2 * h], b[2 * h + 1]);
          multiply<T>(sum[h], whole, b[2 * h], b[2 * h + 1]);
        }
      }
      float* const to = work.proj_parts + (int64_t(blockIdx.x) * views + view) * (inner + 1) * channels;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int channel = slice + 16 * j + 8 * h + 2 * q;
        if (channel >= channels) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int m = g + 8 * i;
          if (m <= inner)
            store(to + int64_t(m) * channels + channel, Lane<2>{{sum[h][2 * i], sum[h][2 * i + 1]}});
        }
      }
    }
    __syncthreads();
  }

  // dx goes through shared memory, so that lanes have eight channels one after the other.
  float* const stage = reinterpret_cast<float*>(shared) + 16 * warp * kPitch;
#pragma unroll
  for (int j = 0; j < 2 * kPairs; j++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      store(stage + (g + 8 * i) * kPitch + 8 * j + 2 * q, Lane<2>{{dx[j][2 * i], dx[j][2 * i + 1]}});
    }
  }
  __syncwarp();
  const int eight = lane % 8, c = slice + 8 * eight;
  if (c >= channels) return;
  const T* const grad = static_cast<const T*>(args.grad) + base * channels + c;
  T* const out = static_cast<T*>(args.grad_features) + base * channels + c;
  const int eights = eights_of(args);
  const uint8_t* const all_won = work.won + base * eights + c / 8;
  const RowGradient<4, true> gradient[2] = {{args, work.sums, views, c}, {args, work.sums, views, c + 4}};
  constexpr int kAtOnce = 2;
  for (int k = 0; k < 4; k += kAtOnce) {
    Pack<T, 4> own[kAtOnce][2], dys[kAtOnce][2];
    Pack<Half, 4> zs[kAtOnce][2];
    uint32_t won[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int token = min(16 * warp + 4 * (k + i) + lane / 8, tokens - 1);
      const int64_t at = int64_t(max(voxels[token], 0)) * channels + c;
      won[i] = all_won[token * eights];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        own[i][h] = *reinterpret_cast<const Pack<T, 4>*>(grad + token * channels + 4 * h);
        dys[i][h] = *reinterpret_cast<const Pack<T, 4>*>(static_cast<const T*>(work.voxel_dy) + at + 4 * h);
        zs[i][h] =
            *reinterpret_cast<const Pack<Half, 4>*>(static_cast<const Half*>(work.voxels) + at + 4 * h);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int row = 4 * (k + i) + lane / 8, token = 16 * warp + row;
      if (token >= tokens) break;
      const float share = voxel_shares[token];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Lane<4> sum = load<4>(stage + row * kPitch + 8 * eight + 4 * h), dy, z;
#pragma unroll
        for (int n = 0; n < 4; n++) {
          if (args.residual) sum.at[n] += widen(own[i][h].at[n]);
          dy.at[n] = widen(dys[i][h].at[n]);
          z.at[n] = widen(zs[i][h].at[n]);
        }
        if (voxels[token] >= 0) {
          const Lane<4> dz = gradient[h](dy, z);
#pragma unroll
          for (int n = 0; n < 4; n++) {
            sum.at[n] += dz.at[n] * share + (won[i] >> (4 * h + n) & 1 ? dz.at[n] : 0.0f);
          }
        }
        store(out + token * channels + 4 * h, sum);
      }
    }
  }
}

}  // namespace

int64_t tile_products_shared(const Guided& args) { return Layout(args).bytes; }

int tile_products(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kSlice));
  const int bytes = static_cast<int>(tile_products_shared(args));
  const auto kernel = args.dtype == Dtype::f16 ? product_tiles_kernel<Half> : product_tiles_kernel<BFloat16>;
  if (const int error = allow_shared(kernel, bytes)) return error;
  kernel<<<grid, kThreads, bytes, stream>>>(args, work);
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
