// Gradients of the activations of all rows of views by tiles of 16 rows (tiles.cuh), with the sums
// that batch normalisation's gradient needs, and ds of every token.
//
// A block takes a cloud and 64 channels. What all channels agreed on comes first, as factors of each token:
// of G and of s in dg_v, of g_v in ds. Then a warp takes a tile, whose dg is a product of these with G and s;
// g stays in shared memory, from where every warp collects ds of 16 tokens. Views whose rows do not fit at
// once are taken in turn. Factors are two numbers of 16 bits that add up to them; those with s, which has
// binary16, are multiplied by a power of two.
#include "guided_aggregate/tiles.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kTiles = 10;  // kept at once
constexpr int kHalves = 2;  // parts of a tile that warps take apart
constexpr int kPart = kPairs / kHalves;
constexpr int kFactorThreads = 768;
constexpr int kFactorWarps = kFactorThreads / kWarp;

// Offsets into the shared memory of a block, which begins where 128 bytes do.
struct Layout {
  int grad, space;  // 16 bits [kTokens, kSlice]
  int kept;         // binary16 [16 kTiles, kSlice]: g
  int sums;         // float2 [kTiles, kSlice]: of dy, of dy z^
  int constants;    // float4 [V, kSlice / 2]: two weights, two biases
  int tables;
  int bytes = 0;

  __host__ __device__ explicit Layout(const Guided& args) {
    grad = take(2 * kTokens * kSlice);
    space = take(2 * kTokens * kSlice);
    kept = take(2 * kTiles * kRowTile * kSlice);
    sums = take(8 * kTiles * kSlice);
    constants = take(8 * static_cast<int>(args.views) * kSlice);
    tables = take(Tables(args.views).bytes);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// A power of two that brings a number from 2^-50 to 2^50 into [256, 512), and what takes it back.
struct Scale {
  float up, down;
  __device__ explicit Scale(float most) {
    const int power = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -50), 50) - 8;
    up = __uint_as_float(static_cast<uint32_t>(127 - power) << 23);
    down = __uint_as_float(static_cast<uint32_t>(127 + power) << 23);
  }
};

__device__ inline float most_of_warp(float value) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, d));
  return value;
}

// Bytes of shared memory of a block of tile_factors_kernel: the tables, float [4, V, kTokens], [2, kTokens]
// and [2, warps].
int factors_shared(const Guided& args) {
  const int views = static_cast<int>(args.views);
  return Tables(views).bytes + 4 * ((4 * views + 2) * kTokens + 2 * kFactorWarps);
}

// What all channels agreed on, as factors of each token, and in the order of each view's cells. A block takes
// a cloud.
template <typename T>
__global__ void __launch_bounds__(kFactorThreads)
    tile_factors_kernel(GuidedBackward args, GradientWork work, int slices) {
  extern __shared__ __align__(128) char shared[];
  const Tables tables(args.views);
  uint16_t* const planes = reinterpret_cast<uint16_t*>(shared + tables.planes);
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(shared + tables.pairs);
  uint16_t* const gammas = reinterpret_cast<uint16_t*>(shared + tables.gammas);
  float* const bents = reinterpret_cast<float*>(shared + tables.bents);
  float* const scales = reinterpret_cast<float*>(shared + tables.scales);
  const Places* const places = reinterpret_cast<const Places*>(shared + tables.places);
  const int32_t* const held = reinterpret_cast<const int32_t*>(shared + tables.held);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int all = views * kTokens;
  float* const weights = reinterpret_cast<float*>(shared + tables.bytes);  // [V, kTokens], then factors of G
  float* const pulls = weights + all;                                      // then of s
  float* const bent = pulls + all;
  float* const parts = bent + all;  // of the factor of s in ds
  float* const totals = parts + all;
  float* const means = totals + kTokens;
  float* const most = means + kTokens;
  const float* const agreement = args.agreement + base;
  const auto norm_of = [&](int64_t at) { return fmaxf(sqrtf(agreement[at]), kNorm); };
  load_places(args, reinterpret_cast<Places*>(shared + tables.places),
              reinterpret_cast<uint8_t*>(shared + tables.own),
              reinterpret_cast<int32_t*>(shared + tables.held));
  for (int i = threadIdx.x; i < all; i += kFactorThreads) {
    const int view = i / kTokens, token = i % kTokens;
    if (token >= tokens) continue;
    float pull = 0.0f;
#pragma unroll 12
    for (int s = 0; s < slices; s++) pull += work.pulls[(int64_t(s) * views + view) * rows + base + token];
    const float norm = norm_of((views + view) * rows + token), length = norm_of(2 * views * rows + token);
    weights[i] = (agreement[view * rows + token] / (norm * length) + 1.0f) / 2.0f;
    pulls[i] = pull;
  }
  __syncthreads();
  if (threadIdx.x < tokens) {
    float total = 0.0f, mean = 0.0f;
    for (int v = 0; v < views; v++) total += weights[v * kTokens + threadIdx.x];
    total = fmaxf(total, kTiny);
    for (int v = 0; v < views; v++) {
      mean = fmaf(weights[v * kTokens + threadIdx.x] / total, pulls[v * kTokens + threadIdx.x], mean);
    }
    totals[threadIdx.x] = total;
    means[threadIdx.x] = mean;
  }
  __syncthreads();
  float largest = 0.0f;
  for (int i = threadIdx.x; i < all; i += kFactorThreads) {
    const int view = i / kTokens, token = i % kTokens;
    if (token >= tokens) {
      weights[i] = pulls[i] = bent[i] = parts[i] = 0.0f;
      continue;
    }
    const float norm = norm_of((views + view) * rows + token), length = norm_of(2 * views * rows + token);
    const float cosine = agreement[view * rows + token] / (norm * length);
    const float du = 0.5f * args.coefficient * (pulls[i] - means[token]) / totals[token];
    // Where there is no voxel s is zero, and its factor, which may be large, must not set the scale.
    const bool some = args.segment[views * rows + base + token] >= 0;
    const float alpha = some ? du / (norm * length) : 0.0f, away = -du * cosine;
    weights[i] = args.coefficient * weights[i] / totals[token];
    pulls[i] = alpha;
    bent[i] = norm > kNorm ? away / norm / norm : 0.0f;
    parts[i] = length > kNorm ? away / length / length : 0.0f;
    largest = fmaxf(largest, fabsf(alpha));
  }
  largest = most_of_warp(largest);
  if (lane == 0) most[warp] = largest;
  __syncthreads();
  float gamma = 0.0f;  // of token threadIdx.x
  if (threadIdx.x < kTokens) {
    for (int v = 0; v < views; v++) gamma += parts[v * kTokens + threadIdx.x];
  }
  largest = most_of_warp(fabsf(gamma));
  if (lane == 0) most[kFactorWarps + warp] = largest;
  __syncthreads();
  const Scale scale(most_of_warp(lane < kFactorWarps ? most[lane] : 0.0f));
  const Scale long_scale(most_of_warp(lane < kFactorWarps ? most[kFactorWarps + lane] : 0.0f));
  if (threadIdx.x == 0) {
    int32_t* const before = reinterpret_cast<int32_t*>(shared + tables.tiles);
    before[0] = 0;
    for (int v = 0; v < views; v++) before[v + 1] = before[v] + tiles_of(held[v]);
    scales[0] = scale.down;
    scales[1] = long_scale.down * scale.up;
  }
  if (threadIdx.x < kTokens) {
    gammas[threadIdx.x] = static_cast<uint16_t>(bounded_two<Half>(gamma * long_scale.up, 0.0f));
  }
  // Factors of G that are multiplied like those of s need no sum of their own; binary16 has not the range.
  const float up = std::is_same_v<T, Half> ? 1.0f : scale.up;
  for (int i = threadIdx.x; i < views * (kPlaces / 2); i += kFactorThreads) {
    const int view = i / (kPlaces / 2), place = i % (kPlaces / 2) * 2;
    float of_grad[2] = {}, of_space[2] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (place + n >= tokens) break;
      const int at = view * kTokens + places[view].token[place + n];
      of_grad[n] = weights[at] * up;
      of_space[n] = pulls[at] * scale.up;
    }
    uint32_t* const to = reinterpret_cast<uint32_t*>(planes + view * 3 * kPlaces + place);
    to[0] = bounded_two<Half>(of_space[0], of_space[1]);
    split_two<T>(of_grad[0], of_grad[1], to + kPlaces / 2, to + kPlaces);
  }
  for (int i = threadIdx.x; i < all; i += kFactorThreads) {
    pairs[i] = static_cast<uint16_t>(bounded_two<Half>(pulls[i] * scale.up, 0.0f));
    const Places& own = places[i / kTokens];
    const int row = i % kTokens;
    float sum = 0.0f;
    if (row < held[i / kTokens]) {
      for (int p = own.begin[row]; p < own.begin[row + 1]; p++) sum += bent[i - row + own.token[p]];
    }
    bents[i] = sum;
  }
  __syncthreads();
  uint4* const to =
      reinterpret_cast<uint4*>(reinterpret_cast<char*>(work.tables) + int64_t(blockIdx.x) * tables.bytes);
  for (int i = threadIdx.x; i < tables.bytes / 16; i += kFactorThreads) {
    to[i] = reinterpret_cast<const uint4*>(shared)[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) gradient_tiles_kernel(GuidedBackward args, GradientWork work) {
  extern __shared__ __align__(128) char shared[];
  const Layout layout(args);
  const Tables tables(args.views);
  uint16_t* const grad = reinterpret_cast<uint16_t*>(shared + layout.grad);
  uint16_t* const space = reinterpret_cast<uint16_t*>(shared + layout.space);
  uint16_t* const kept = reinterpret_cast<uint16_t*>(shared + layout.kept);
  float* const sums = reinterpret_cast<float*>(shared + layout.sums);
  float4* const constants = reinterpret_cast<float4*>(shared + layout.constants);
  const char* const table = shared + layout.tables;
  const uint16_t* const planes = reinterpret_cast<const uint16_t*>(table + tables.planes);
  const uint16_t* const pairs = reinterpret_cast<const uint16_t*>(table + tables.pairs);
  const uint16_t* const gammas = reinterpret_cast<const uint16_t*>(table + tables.gammas);
  const float* const bents = reinterpret_cast<const float*>(table + tables.bents);
  const float* const scales = reinterpret_cast<const float*>(table + tables.scales);
  const Places* const places = reinterpret_cast<const Places*>(table + tables.places);
  const uint8_t* const own_rows = reinterpret_cast<const uint8_t*>(table + tables.own);
  const int32_t* const before = reinterpret_cast<const int32_t*>(table + tables.tiles);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, q = lane % 4;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), slice = blockIdx.y * kSlice;
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;

  copy_tables(shared + layout.tables, work, tables, 0);
  const T* const all_grad = static_cast<const T*>(args.grad) + base * channels + slice;
  const Half* const all_space = static_cast<const Half*>(work.space) + slice;
  const int32_t* const voxels = args.segment + views * rows + base;
  in_batches<4>(
      kTokens * (kSlice / 8),
      [&](int i) {
        const int token = i / (kSlice / 8), eight = i % (kSlice / 8);
        const bool inside = token < tokens && slice + 8 * eight < channels;
        copy_async<16>(grad + at_row(token, eight), all_grad + (inside ? token * channels + 8 * eight : 0),
                       inside);
        return inside ? voxels[token] : -1;
      },
      [&](int i, int voxel) {
        const int token = i / (kSlice / 8), eight = i % (kSlice / 8);
        copy_async<16>(space + at_row(token, eight),
                       all_space + (voxel >= 0 ? int64_t(voxel) * channels + 8 * eight : 0), voxel >= 0);
      });
  copy_commit();
  in_batches<2>(
      views * (kSlice / 2),
      [&](int i) {
        const int c = slice + i % (kSlice / 2) * 2, at = i / (kSlice / 2) * channels + c;
        if (c >= channels) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const Lane<2> weight = load<2>(args.view_weight + at), bias = load<2>(args.view_bias + at);
        return make_float4(weight.at[0], weight.at[1], bias.at[0], bias.at[1]);
      },
      [&](int i, const float4& of) { constants[i] = of; });
  copy_wait<0>();
  __syncthreads();

  float ds[2 * kPairs][4] = {};
  // Rows times a diagonal matrix of the factors of this warp's tokens.
  const auto collect = [&](const uint16_t* factors, const uint16_t* from, int row) {
    const bool mine = g / 2 == q;
    const int shift = g % 2 * 16;
    const uint32_t near = mine ? uint32_t(factors[16 * warp + g]) << shift : 0;
    const uint32_t far = mine ? uint32_t(factors[16 * warp + g + 8]) << shift : 0;
    const uint32_t diagonal[4] = {near, 0, 0, far};
    multiply_rows<Half, kPairs>(ds, diagonal, shared_address(from + at_row(row, lane / 16)));
  };
  collect(gammas, space, 16 * warp + lane % 16);
#pragma unroll
  for (int j = 0; j < 2 * kPairs; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) ds[j][i] *= scales[1];
  }
  const float down = scales[0];
  const uint4* const waiting = static_cast<const uint4*>(work.rows);
  uint4* const out = static_cast<uint4*>(work.dy);
  constexpr int kPasses = std::is_same_v<T, Half> ? 2 : 1;
  for (int first_view = 0, last; first_view < views; first_view = last) {
    last = last_of_tiles(before, first_view, views, kTiles);
    const int first_tile = before[first_view];
    for (int unit = warp, view = first_view;; unit += kTileWarps) {
      const int task = unit / kHalves, first_pair = unit % kHalves * kPart;
      while (view < last && first_tile + task >= before[view + 1]) view++;
      if (view == last) break;
      const int tile = first_tile + task - before[view], first = tile * kRowTile, row = first + g;
      const uint32_t two_row[2] = {two_rows(row), two_rows(row + 8)};
      const Places& own = places[view];
      const int64_t at = tile_at(args, view, tile) + first_pair * kWarp;
      uint4 normed[kPart];
#pragma unroll
      for (int j = 0; j < kPart; j++) normed[j] = fetch_words(waiting + at + j * kWarp);
      const int begin = own.begin[first] & ~1, end = own.begin[min(first + kRowTile, tokens)];
      float sum[2 * kPart][4] = {};
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        for (int place = begin; place < end; place += 16) {
          uint32_t mask[4], high[4], low[4];
          masks_of(mask, own, place + 2 * q, two_row);
          const int from = at_row(own.token[place + lane % 16], 2 * first_pair + lane / 16);
          const uint32_t* const plane =
              reinterpret_cast<const uint32_t*>(planes + view * 3 * kPlaces + place) + q;
          const auto factors = [&](uint32_t (&a)[4], int which) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = mask[i] & plane[which * (kPlaces / 2) + i / 2 * 4];
          };
          if (pass == 0) {
            factors(high, 0);
            multiply_rows<Half, kPart>(sum, high, shared_address(space + from));
          }
          if (pass + 1 == kPasses) {
            factors(high, 1);
            factors(low, 2);
            multiply_rows<T, kPart>(sum, high, low, shared_address(grad + from));
          }
        }
        if (pass + 1 == kPasses) continue;
#pragma unroll
        for (int j = 0; j < 2 * kPart; j++) {
#pragma unroll
          for (int i = 0; i < 4; i++) sum[j][i] *= down;
        }
      }
      const float after = kPasses == 2 ? 1.0f : down;
      const float bent[2] = {bents[view * kTokens + row], bents[view * kTokens + row + 8]};
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        const uint32_t words[4] = {normed[j].x, normed[j].y, normed[j].z, normed[j].w};
        uint32_t dys[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int eight = 2 * (first_pair + j) + h;
          const float4 of = constants[view * (kSlice / 2) + 4 * eight + q];
          float totals[4] = {};  // of dy of two channels, of dy z^
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const Lane<2> z = unpack_two<Half>(words[2 * h + i]);
            const GeluTwo both = gelu_two<T>(fmaf(z.at[0], of.x, of.z), fmaf(z.at[1], of.y, of.w));
            Lane<2> dy;
#pragma unroll
            for (int n = 0; n < 2; n++) {
              dy.at[n] =
                  fmaf(bent[i], both.value.at[n], sum[2 * j + h][2 * i + n] * after) * both.slope.at[n];
              totals[n] += dy.at[n];
              totals[2 + n] = fmaf(dy.at[n], z.at[n], totals[2 + n]);
            }
            *reinterpret_cast<uint32_t*>(kept + at_row(task * kRowTile + g + 8 * i, eight) + 2 * q) =
                both.kept;
            dys[2 * h + i] = pack_two<T>(dy.at[0], dy.at[1]);
          }
          const bool upper = lane & 16, middle = lane & 8;
          float two[2];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            two[n] = (upper ? totals[2 + n] : totals[n]) +
                     __shfl_xor_sync(kAll, upper ? totals[n] : totals[2 + n], 16);
          }
          float total = (middle ? two[1] : two[0]) + __shfl_xor_sync(kAll, middle ? two[0] : two[1], 8);
          total += __shfl_xor_sync(kAll, total, 4);
          if ((lane & 4) == 0) sums[(task * kSlice + 8 * eight + 2 * q + middle) * 2 + upper] = total;
        }
        out[at + j * kWarp] = make_uint4(dys[0], dys[1], dys[2], dys[3]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (last - first_view) * kSlice; i += kThreads) {
      const int view = first_view + i / kSlice, column = i % kSlice, channel = slice + column;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int tile = before[view] - first_tile; tile < before[view + 1] - first_tile; tile++) {
        const float2 part = reinterpret_cast<const float2*>(sums)[tile * kSlice + column];
        sum.x += part.x;
        sum.y += part.y;
      }
      if (channel < channels) work.parts[(blockIdx.x * args.layers + view) * channels + channel] = sum;
    }
    for (int view = first_view; view < last; view++) {
      collect(pairs + view * kTokens, kept,
              (before[view] - first_tile) * kRowTile + own_rows[view * kTokens + 16 * warp + lane % 16]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = 16 * warp + g + 8 * i;
    if (token >= tokens) continue;
    float* const to = work.grad_space + (base + token) * channels + slice + 2 * q;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; j++) {
      if (slice + 8 * j >= channels) continue;
      store(to + 8 * j, Lane<2>{{ds[j][2 * i] * down, ds[j][2 * i + 1] * down}});
    }
  }
}

}  // namespace

int64_t tile_rows_shared(const Guided& args) {
  return Layout(args).bytes > factors_shared(args) ? Layout(args).bytes : factors_shared(args);
}
int64_t tile_tables(const Guided& args) { return args.clouds * Tables(args.views).bytes; }

int tile_gradients(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kSlice));
  const int bytes = Layout(args).bytes, factors = factors_shared(args);
  int error = 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    error = allow_shared(tile_factors_kernel<T>, factors);
    if (!error) error = allow_shared(gradient_tiles_kernel<T>, bytes);
    if (error) return;
    tile_factors_kernel<T><<<grid.x, kFactorThreads, factors, stream>>>(args, work, static_cast<int>(grid.y));
    gradient_tiles_kernel<T><<<grid, kThreads, bytes, stream>>>(args, work);
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
