// Gradients of all rows and what follows from them: of the tokens by sums over views and voxels, of the heads
// and of the projection by products.
//
// A block takes a cloud and 64 channels. The rows of the views stay in shared memory; from there tokens
// collect theirs, and tensor cores take them in TF32: of bfloat16 features rounded, of others as three
// products of high and low parts, so that nothing of float32 is lost that matters. Half a warp takes a row or
// a token, a lane four channels. Views whose rows do not fit at once are taken in turn. What comes from other
// memory is fetched for several rows or tokens at once, since stores in between would hold it up.
#include "guided_aggregate/gradient.cuh"
#include "guided_aggregate/tf32.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kProductThreads = kProductWarps * kWarp;
constexpr int kPair = 2;           // tokens of half a warp fetched at once
constexpr int kTiles = 3;          // of rows that share a piece of the projection
constexpr int kHalf = kSlice / 2;  // channels of a warp in the projection's gradient

// Offsets into the shared memory of a block.
struct Layout {
  int rows;   // float [kept, channels]: dz / tokens
  int index;  // int [S, V]: where a token's rows are, in bytes
  int count;  // float [V, S]: tokens of a row
  int first;  // int [V]: where a view's rows begin
  int held;   // int [V]: rows
  int voxel;  // int [S]
  int share;  // float [S]: 1 / tokens of the voxel
  int bytes = 0;

  __host__ __device__ Layout(const Guided& args, int kept) {
    const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
    rows = take(4 * kept * kSlice);
    index = take(4 * views * tokens);
    count = take(4 * views * tokens);
    first = take(4 * views);
    held = take(4 * views);
    voxel = take(4 * tokens);
    share = take(4 * tokens);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// Where a row has its channel, in bytes: such that 8 rows of 4 channels, or 4 rows of 8, lie in different
// banks. The channel may be added to that of channel 0 by exclusive or.
__device__ inline int place_of(int row) { return (row * kSlice | (row & 3) << 3 | (row & 4)) * 4; }

template <typename Format>
__global__ void __launch_bounds__(kProductThreads, 3)
    products_kernel(GuidedBackward args, GradientWork work, int kept) {
  extern __shared__ float4 room[];
  using T = typename Format::T;
  using Gradient = RowGradient<4, Format::kNarrow>;
  using Dy = Pack<typename Format::Gradient, 4>;
  using Row = Pack<typename Format::Row, 4>;
  constexpr int kBatch = Format::kNarrow ? 4 : 2;  // rows of half a warp fetched at once
  constexpr bool kSplit = !std::is_same_v<T, BFloat16>;
  const auto* const all_rows = static_cast<const typename Format::Row*>(work.rows);
  const auto* const all_dy = static_cast<const typename Format::Gradient*>(work.dy);
  char* shared = reinterpret_cast<char*>(room);
  const Layout layout(args, kept);
  int32_t* index = reinterpret_cast<int32_t*>(shared + layout.index);
  float* counts = reinterpret_cast<float*>(shared + layout.count);
  int32_t* firsts = reinterpret_cast<int32_t*>(shared + layout.first);
  int32_t* held = reinterpret_cast<int32_t*>(shared + layout.held);
  int32_t* voxels = reinterpret_cast<int32_t*>(shared + layout.voxel);
  float* voxel_shares = reinterpret_cast<float*>(shared + layout.share);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), inner = static_cast<int>(args.inner);
  const int pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int half = lane / 16, column = lane % 16 * 4;
  const int slice = blockIdx.y * kSlice, c = slice + column < channels ? slice + column : 0;
  const bool active = slice + column < channels;

  for (int i = threadIdx.x; i < views; i += kProductThreads)
    held[i] = args.count[i * args.clouds + blockIdx.x];
  const int32_t* voxel_start = args.start + views * (rows + 1);
  for (int i = threadIdx.x; i < tokens; i += kProductThreads) {
    const int voxel = args.segment[views * rows + base + i];
    voxels[i] = voxel;
    if (voxel >= 0) voxel_shares[i] = 1.0f / static_cast<float>(voxel_start[voxel + 1] - voxel_start[voxel]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int view = 0, last = 0, row = 0; view < views; view++) {
      if (view == last) {
        last = last_of_group(held, view, views, kept - kRowTile, views);
        row = 0;
      }
      firsts[view] = row;
      row += held[view];
    }
  }
  __syncthreads();
  for (int v = 0; v < views; v++) {
    const int32_t *segment = args.segment + v * rows + base, *start = args.start + v * (rows + 1) + base;
    for (int i = threadIdx.x; i < tokens; i += kProductThreads) {
      index[i * views + v] = place_of(static_cast<int>(segment[i] - base) + firsts[v]);
      counts[v * tokens + i] = static_cast<float>(start[i + 1] - start[i]);
    }
  }
  __syncthreads();

  const char* const row_memory = shared + layout.rows;
  const auto at_place = [&](int place) { return *reinterpret_cast<const float*>(row_memory + place); };
  const auto wide = [](const auto& pack) {
    Lane<4> lane;
#pragma unroll
    for (int n = 0; n < 4; n++) lane.at[n] = widen(pack.at[n]);
    return lane;
  };
  const auto fetched = [](const auto* from) {
    using T4 = Pack<std::remove_const_t<std::remove_pointer_t<decltype(from)>>, 4>;
    return *reinterpret_cast<const T4*>(from);
  };
  for (int view = 0, last; view < views; view = last) {
    last = last_of_group(held, view, views, kept - kRowTile, views);
    int all = 0;
    for (int v = view; v < last; v++) all += held[v];
    // Warps take as many rows each, one after the other.
    const int begin = all * warp / kProductWarps, end = all * (warp + 1) / kProductWarps;
    for (int v = view, first = 0; v < last; first += held[v++]) {
      const int stop = min(end, first + held[v]);
      int row = max(begin, first);
      if (row >= stop) continue;
      const Gradient gradient(args, work.sums, v, c);
      const int64_t at = (v * rows + base - first) * channels + c;
      const auto* const z = all_rows + at;
      const auto* const dy = all_dy + at;
      const float* const count = counts + v * tokens - first;
      for (row += half; row < stop; row += 2 * kBatch) {
        Dy dys[kBatch];
        Row zs[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int from = min(row + 2 * i, stop - 1) * channels;
          dys[i] = fetched(dy + from);
          zs[i] = fetched(z + from);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const int own = row + 2 * i;
          if (own >= stop) break;
          Lane<4> d = gradient(wide(dys[i]), wide(zs[i]));
          const float share = active ? reciprocal(count[own]) : 0.0f;
#pragma unroll
          for (int n = 0; n < 4; n++) d.at[n] *= share;
          store(reinterpret_cast<float*>(shared + layout.rows + (place_of(own) ^ 4 * column)), d);
        }
      }
    }
    __syncthreads();

    const T* grad = static_cast<const T*>(args.grad) + base * channels + c;
    T* out = static_cast<T*>(args.grad_features) + base * channels + c;
    float* waiting = work.grad_space + base * channels + c;
    const int64_t voxel_layer = views * rows * channels + c;
    const auto* const voxel_z = all_rows + voxel_layer;
    const auto* const voxel_dy = all_dy + voxel_layer;
    const int eights = eights_of(args);
    const uint8_t* const all_won = work.won + base * eights + c / 8;
    const Gradient voxel_gradient(args, work.sums, views, c);
    for (int next = 2 * warp + half; next < tokens; next += 2 * kPair * kProductWarps) {
      Lane<4> dx[kPair];
      Dy dys[kPair];
      Row zs[kPair];
      uint32_t won[kPair];
      int voxel[kPair];
#pragma unroll
      for (int i = 0; i < kPair; i++) {
        const int token = min(next + 2 * i * kProductWarps, tokens - 1);
        if (view > 0) {
          dx[i] = load<4>(waiting + token * channels);
          continue;
        }
        dx[i] = args.residual ? load<4>(grad + token * channels) : Lane<4>{};
        voxel[i] = voxels[token];
        const int from = max(voxel[i], 0) * channels;
        dys[i] = fetched(voxel_dy + from);
        zs[i] = fetched(voxel_z + from);
        won[i] = all_won[token * eights];
      }
#pragma unroll
      for (int i = 0; i < kPair; i++) {
        const int token = next + 2 * i * kProductWarps;
        if (token >= tokens) break;
        if (view == 0 && voxel[i] >= 0) {
          const Lane<4> dz = voxel_gradient(wide(dys[i]), wide(zs[i]));
          const float share = voxel_shares[token];
#pragma unroll
          for (int n = 0; n < 4; n++) {
            dx[i].at[n] += dz.at[n] * share + (won[i] >> (c % 8 + n) & 1 ? dz.at[n] : 0.0f);
          }
        }
        const int32_t* const place = index + token * views;
        const auto collect = [&](int v) {
          const int from = place[v] ^ 4 * column;
          add(&dx[i], 1.0f, load<4>(reinterpret_cast<const float*>(row_memory + from)));
        };
        if (last - view == kViews) {
#pragma unroll
          for (int v = 0; v < kViews; v++) collect(view + v);
        } else {
          for (int v = view; v < last; v++) collect(v);
        }
        if (!active) continue;
        if (last < views) {
          store(waiting + token * channels, dx[i]);
        } else {
          store(out + token * channels, dx[i]);
        }
      }
    }

    // Tasks of the warps: tiles of rows times the projection, or rows times coefficients of a view.
    const int edge = channels - 1 - slice;  // beyond it rows are zero
    int task = 0;
    for (int v = view, first = 0; v < last; first += held[v++]) {
      const int64_t first_row = v * rows + base;
      const float* proj = args.proj + int64_t(v) * (inner + 1) * channels;
      for (int columns = 0; columns < inner; columns += 16) {
        for (int tile = 0; tile < held[v]; tile += kTiles * kRowTile) {
          if (task++ % kProductWarps != warp) continue;
          const int tiles = min((held[v] - tile + kRowTile - 1) / kRowTile, kTiles);
          int near[kTiles], far[kTiles];
#pragma unroll
          for (int t = 0; t < kTiles; t++) {
            const int row = first + tile + min(t, tiles - 1) * kRowTile + lane / 4;
            near[t] = place_of(row) ^ lane % 4 * 4;
            far[t] = place_of(row + 8) ^ lane % 4 * 4;
          }
          const float* column[2];
          float next[2][2];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            column[n] = proj + int64_t(min(columns + 8 * n + lane / 4, inner)) * channels + slice;
          }
          const auto fetch = [&](int k) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
              for (int i = 0; i < 2; i++) next[n][i] = column[n][min(k + lane % 4 + i * 4, edge)];
            }
          };
          float sum[kTiles][2][4] = {};
          fetch(0);
#pragma unroll 2
          for (int k = 0; k < kSlice; k += 8) {
            const Fragment<2, kSplit> b[2] = {Fragment<2, kSplit>(next[0]), Fragment<2, kSplit>(next[1])};
            if (k + 8 < kSlice) fetch(k + 8);
#pragma unroll
            for (int t = 0; t < kTiles; t++) {
              if (t >= tiles) break;
              const float values[4] = {at_place(near[t] ^ 4 * k), at_place(far[t] ^ 4 * k),
                                       at_place(near[t] ^ (4 * k + 16)), at_place(far[t] ^ (4 * k + 16))};
              const Fragment<4, kSplit> a(values);
#pragma unroll
              for (int n = 0; n < 2; n++) multiply(sum[t][n], a, b[n]);
            }
          }
          float* heads = work.grad_parts + (int64_t(blockIdx.y) * views * rows + first_row) * pad + columns;
#pragma unroll
          for (int t = 0; t < kTiles; t++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
              for (int i = 0; i < 2; i++) {
                const int r = tile + t * kRowTile + lane / 4 + i * 8, m = 8 * n + lane % 4 * 2;
                if (r < held[v] && columns + m < pad) {
                  store(heads + r * pad + m, Lane<2>{{sum[t][n][2 * i], sum[t][n][2 * i + 1]}});
                }
              }
            }
          }
        }
      }
      for (int columns = 0; columns <= inner; columns += 16) {
        for (int left = 0; left < kSlice; left += kHalf) {
          if (task++ % kProductWarps != warp) continue;
          const float* const coefficient = args.inner_means + first_row * pad + columns;
          const float* const count = counts + v * tokens;
          int place[2], offset[kHalf / 8];  // of rows; of channels
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int row = first + lane % 4 + i * 4;
            place[i] = (row * kSlice + (lane / 4 ^ (row & 4))) * 4;
          }
#pragma unroll
          for (int n = 0; n < kHalf / 8; n++) offset[n] = ((left + 8 * n) ^ (first + lane % 4 & 3) << 3) * 4;
          float next[4];
          const auto fetch = [&](int k) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int m = lane / 4 + i % 2 * 8, r = k + lane % 4 + i / 2 * 4;
              next[i] = 0.0f;
              if (columns + m <= inner && r < held[v]) next[i] = coefficient[r * pad + m] * count[r];
            }
          };
          float sum[kHalf / 8][4] = {};
          fetch(0);
          for (int k = 0; k < held[v]; k += 8) {
            const Fragment<4, kSplit> a(next);
            fetch(k + 8);
#pragma unroll
            for (int n = 0; n < kHalf / 8; n++) {
              float values[2];
#pragma unroll
              for (int i = 0; i < 2; i++) {
                values[i] = k + lane % 4 + i * 4 < held[v] ? at_place(place[i] + offset[n]) : 0.0f;
              }
              multiply(sum[n], a, Fragment<2, kSplit>(values));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) place[i] += 8 * kSlice * 4;
          }
          float* to = work.proj_parts + (int64_t(blockIdx.x) * views + v) * (inner + 1) * channels;
#pragma unroll
          for (int n = 0; n < kHalf / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int m = columns + lane / 4 + i * 8, channel = slice + left + 8 * n + lane % 4 * 2;
              if (m > inner || channel >= channels) continue;
              store(to + int64_t(m) * channels + channel, Lane<2>{{sum[n][2 * i], sum[n][2 * i + 1]}});
            }
          }
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

int64_t products_shared(const Guided& args) { return Layout(args, kept_rows(args)).bytes; }

int row_products(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kSlice));
  const int bytes = static_cast<int>(products_shared(args));
  int error = 0;
  with_format(args, [&](auto format) {
    const auto kernel = products_kernel<decltype(format)>;
    error = allow_shared(kernel, bytes);
    if (!error) kernel<<<grid, kProductThreads, bytes, stream>>>(args, work, kept_rows(args));
  });
  return error ? error : cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
