// Gradients of all rows and what follows from them: of the tokens by sums over views and voxels, of the heads
// and of the projection by products.
//
// A block takes a cloud and 64 channels. The rows of the views stay in shared memory; from there tokens
// collect theirs, and tensor cores take them: in TF32 as three products of high and low parts, so that
// nothing of float32 is lost that matters. Views whose rows do not fit at once are taken in turn.
#include "guided_aggregate/gradient.cuh"
#include "guided_aggregate/tf32.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kProductThreads = kProductWarps * kWarp;
constexpr int kAhead = 2;          // rows on their way
constexpr int kHalf = kSlice / 2;  // channels of a warp in the projection's gradient

// Offsets into the shared memory of a block.
struct Layout {
  int index;  // int [S, V]: where a token's rows are
  int count;  // float [V, S]: tokens of a row
  int first;  // int [V]: where a view's rows begin
  int held;   // int [V]: rows
  int voxel;  // int [S]
  int share;  // float [S]: 1 / tokens of the voxel
  int rows;   // float [kept, channels]: dz / tokens
  int bytes = 0;

  __host__ __device__ Layout(const Guided& args, int kept) {
    const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
    index = take(4 * views * tokens);
    count = take(4 * views * tokens);
    first = take(4 * views);
    held = take(4 * views);
    voxel = take(4 * tokens);
    share = take(4 * tokens);
    rows = take(4 * kept * kSlice);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// Where a row has its channel: such that 8 rows of 4 channels, or 4 rows of 8, lie in different banks.
__device__ inline int place_of(int row, int channel) {
  return row * kSlice + (channel ^ ((row & 3) << 3 | (row & 4)));
}

template <typename T>
__global__ void __launch_bounds__(kProductThreads, 3)
    products_kernel(GuidedBackward args, GradientWork work, int kept) {
  extern __shared__ float4 room[];
  char* shared = reinterpret_cast<char*>(room);
  const Layout layout(args, kept);
  int32_t* index = reinterpret_cast<int32_t*>(shared + layout.index);
  float* counts = reinterpret_cast<float*>(shared + layout.count);
  int32_t* firsts = reinterpret_cast<int32_t*>(shared + layout.first);
  int32_t* held = reinterpret_cast<int32_t*>(shared + layout.held);
  int32_t* voxels = reinterpret_cast<int32_t*>(shared + layout.voxel);
  float* voxel_shares = reinterpret_cast<float*>(shared + layout.share);
  float* d_rows = reinterpret_cast<float*>(shared + layout.rows);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), inner = static_cast<int>(args.inner);
  const int pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int slice = blockIdx.y * kSlice, own = slice + 2 * lane, c = own < channels ? own : 0;
  const bool active = own < channels;

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
      index[i * views + v] = place_of(static_cast<int>(segment[i] - base) + firsts[v], 0);
      counts[v * tokens + i] = static_cast<float>(start[i + 1] - start[i]);
    }
  }
  __syncthreads();

  const RowGradient voxel_gradient(args, work.sums, views, c);
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
      const RowGradient gradient(args, work.sums, v, c);
      const int64_t at = (v * rows + base + row - first) * channels + c;
      const float *z = work.z + at, *dy = work.dy + at, *count = counts + v * tokens - first;
      Lane<2> ahead[kAhead], ahead_z[kAhead];
      const auto fetch = [&](int i) {
        if (row + i < stop) {
          ahead[i] = load<2>(dy);
          ahead_z[i] = load<2>(z);
        }
        dy += channels;
        z += channels;
      };
#pragma unroll
      for (int i = 0; i < kAhead; i++) fetch(i);
      for (; row < stop; row++) {
        Lane<2> d = gradient(ahead[0], ahead_z[0]);
#pragma unroll
        for (int i = 0; i + 1 < kAhead; i++) {
          ahead[i] = ahead[i + 1];
          ahead_z[i] = ahead_z[i + 1];
        }
        if (row + kAhead < stop) {
          ahead[kAhead - 1] = load<2>(dy);
          ahead_z[kAhead - 1] = load<2>(z);
        }
        dy += channels;
        z += channels;
        const float share = active ? reciprocal(count[row]) : 0.0f;
#pragma unroll
        for (int n = 0; n < 2; n++) d.at[n] *= share;
        store(d_rows + (place_of(row, 0) ^ 2 * lane), d);
      }
    }
    __syncthreads();

    const T* grad = static_cast<const T*>(args.grad) + base * channels + c;
    T* out = static_cast<T*>(args.grad_features) + base * channels + c;
    float* waiting = work.grad_space + base * channels + c;
#pragma unroll 2
    for (int token = warp; token < tokens; token += kProductWarps) {
      Lane<2> dx;
      if (view > 0) {
        dx = load<2>(waiting + token * channels);
      } else {
        dx = load<2>(grad + token * channels);
        const int voxel = voxels[token];
        if (voxel >= 0) {
          const int64_t at = (views * rows + voxel) * channels + c;
          const Lane<2> dz = voxel_gradient(load<2>(work.dy + at), load<2>(work.z + at));
          const float share = voxel_shares[token];
          const uint32_t* won = work.won + ((base + token) * gridDim.y + blockIdx.y) * 2;
#pragma unroll
          for (int n = 0; n < 2; n++) {
            dx.at[n] += dz.at[n] * share + (won[n] >> lane & 1 ? dz.at[n] : 0.0f);
          }
        }
      }
#pragma unroll 6
      for (int v = view; v < last; v++) {
        const Lane<2> d = load<2>(d_rows + (index[token * views + v] ^ 2 * lane));
        dx.at[0] += d.at[0];
        dx.at[1] += d.at[1];
      }
      if (!active) continue;
      if (last < views) {
        store(waiting + token * channels, dx);
      } else {
        store(out + token * channels, dx);
      }
    }

    // Tasks of the warps: a tile of rows times the projection, or rows times coefficients of a view.
    const int edge = channels - 1 - slice;  // beyond it rows are zero
    int task = 0;
    for (int v = view, first = 0; v < last; first += held[v++]) {
      const int64_t first_row = v * rows + base;
      const int tiles = (held[v] + kRowTile - 1) / kRowTile;
      const float* proj = args.proj + int64_t(v) * (inner + 1) * channels;
      for (int columns = 0; columns < inner; columns += 16) {
        for (int tile = 0; tile < tiles; tile++) {
          if (task++ % kProductWarps != warp) continue;
          const int row = first + tile * kRowTile + lane / 4;
          const int near = place_of(row, 0), far = place_of(row + 8, 0);
          const float* column[2];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            column[n] = proj + int64_t(min(columns + 8 * n + lane / 4, inner)) * channels + slice;
          }
          float sum[2][4] = {};
#pragma unroll 4
          for (int k = 0; k < kSlice; k += 8) {
            float a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = d_rows[(i % 2 == 0 ? near : far) ^ (k + lane % 4 + i / 2 * 4)];
#pragma unroll
            for (int n = 0; n < 2; n++) {
              float b[2];
#pragma unroll
              for (int i = 0; i < 2; i++) {
                b[i] = column[n][min(k + lane % 4 + i * 4, edge)];
              }
              multiply(sum[n], a, b);
            }
          }
          float* heads = work.grad_parts + (int64_t(blockIdx.y) * views * rows + first_row) * pad + columns;
#pragma unroll
          for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int r = row - first + i * 8, m = 8 * n + lane % 4 * 2;
              if (r < held[v] && columns + m < pad) {
                store(heads + r * pad + m, Lane<2>{{sum[n][2 * i], sum[n][2 * i + 1]}});
              }
            }
          }
        }
      }
      for (int columns = 0; columns <= inner; columns += 16) {
        for (int half = 0; half < kSlice; half += kHalf) {
          if (task++ % kProductWarps != warp) continue;
          const float* coefficient = args.inner_means + first_row * pad;
          const float* count = counts + v * tokens;
          float sum[kHalf / 8][4] = {};
#pragma unroll 2
          for (int k = 0; k < held[v]; k += 8) {
            float a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int m = columns + lane / 4 + i % 2 * 8, r = k + lane % 4 + i / 2 * 4;
              const bool inside = m <= inner && r < held[v];
              a[i] = inside ? coefficient[r * pad + m] * count[r] : 0.0f;
            }
#pragma unroll
            for (int n = 0; n < kHalf / 8; n++) {
              float b[2];
#pragma unroll
              for (int i = 0; i < 2; i++) {
                const int r = k + lane % 4 + i * 4;
                b[i] = r < held[v] ? d_rows[place_of(first + r, half + 8 * n + lane / 4)] : 0.0f;
              }
              multiply(sum[n], a, b);
            }
          }
          float* to = work.proj_parts + (int64_t(blockIdx.x) * views + v) * (inner + 1) * channels;
#pragma unroll
          for (int n = 0; n < kHalf / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int m = columns + lane / 4 + i * 8, channel = slice + half + 8 * n + lane % 4 * 2;
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
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = allow_shared(products_kernel<T>, bytes);
    if (error) return;
    products_kernel<T><<<grid, kProductThreads, bytes, stream>>>(args, work, kept_rows(args));
  });
  return error ? error : cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
