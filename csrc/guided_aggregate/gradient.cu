// Gradients of the activations of all rows, with the sums that batch normalisation's gradient needs.
//
// A block takes a cloud and 64 channels and the rows of the views: dy from the tokens of a row, while g stays
// in shared memory, from where the second half collects ds of every token. Views whose rows do not fit at
// once are taken in turn. Factors come with offsets in bytes, which saves most of the arithmetic of a token.
#include "guided_aggregate/gradient.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kRowThreads = kRowWarps * kWarp;
constexpr int kAhead = 3;     // rows on their way
constexpr int kTogether = 3;  // tokens of a row likewise
constexpr int kPair = 2;      // tokens whose voxels are fetched at once
constexpr int kStretch = 2;   // voxels of a warp
constexpr int kVoxelWarps = 8;
constexpr int kVoxelSlice = 8 * kWarp;

// Activations wait for the tokens in 16 bits of more digits than the features' if those have 16.
template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, float>, float, Half>;

__device__ inline float bits(uint32_t value) { return __uint_as_float(value); }

// What all channels agreed on, as factors of each token: of G and of s in dg_v, of g_v in ds; and where in
// memory the rows are that they belong to. A block takes tokens of a cloud, a thread a token and view.
__global__ void __launch_bounds__(kThreads)
    factors_kernel(GuidedBackward args, GradientWork work, int kept, int slices, int element, int space,
                   int row_bytes, int each) {
  extern __shared__ float4 room[];
  float4* const before = room;  // [each, V]: weight, pull, part of s in ds
  int32_t* const held = reinterpret_cast<int32_t*>(before + each * args.views);  // [V]: rows
  int32_t* const firsts = held + args.views;  // [V]: where a view's rows begin
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int first = blockIdx.y * each, mine = min(each, tokens - first), all = mine * views;
  const float* agreement = args.agreement + base;
  const auto norm_of = [&](int64_t at) { return fmaxf(sqrtf(agreement[at]), kNorm); };
  for (int i = threadIdx.x; i < views; i += kThreads) held[i] = args.count[i * args.clouds + blockIdx.x];
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int view = i / mine, token = first + i - view * mine;
    float pull = 0.0f;
#pragma unroll 12
    for (int s = 0; s < slices; s++) pull += work.pulls[(int64_t(s) * views + view) * rows + base + token];
    const float norm = norm_of((views + view) * rows + token), length = norm_of(2 * views * rows + token);
    const float cosine = agreement[view * rows + token] / (norm * length);
    before[(token - first) * views + view] = make_float4((cosine + 1.0f) / 2.0f, pull, 0.0f, cosine);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int view = 0, last = 0, row = 0; view < views; view++) {
      if (view == last) {
        last = last_of_group(held, view, views, kept, kRowWarps);
        row = 0;
      }
      firsts[view] = row;
      row += held[view];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int view = i / mine, token = first + i - view * mine, own = (token - first) * views;
    float total = 0.0f, mean = 0.0f;
    for (int v = 0; v < views; v++) total += before[own + v].x;
    total = fmaxf(total, kTiny);
    for (int v = 0; v < views; v++) mean = fmaf(before[own + v].x / total, before[own + v].y, mean);
    const float norm = norm_of((views + view) * rows + token), length = norm_of(2 * views * rows + token);
    const float du = 0.5f * args.coefficient * (before[own + view].y - mean) / total;
    const float alpha = du / (norm * length), bent = -du * before[own + view].w;
    const int64_t voxel = args.segment[views * rows + base + token];
    const uint32_t channels = static_cast<uint32_t>(args.channels);
    work.tokens[view * rows + base + token] =
        make_float4(args.coefficient * before[own + view].x / total, alpha, bits(token * channels * element),
                    bits(uint32_t(voxel >= 0 ? voxel : rows) * channels * space));
    work.bents[view * rows + base + token] = norm > kNorm ? bent / norm / norm : 0.0f;
    const int row = static_cast<int>(args.segment[view * rows + base + token] - base) + firsts[view];
    work.pairs[(base + token) * views + view] = make_float2(alpha, bits(row * row_bytes));
    before[own + view].z = length > kNorm ? bent / length / length : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < mine; i += kThreads) {
    float sum = 0.0f;
    for (int v = 0; v < views; v++) sum += before[i * views + v].z;
    work.gammas[base + first + i] = sum;
  }
}

// Offsets into the shared memory of a block of rows_kernel.
struct Layout {
  int place;  // float4 [V, S]: factors of G and s, offsets in bytes of G and s
  int pair;   // float2 [S, V]: factor of g_v in ds, offset of its row
  int cell;   // float2 [V, S]: factor of g in dg, begin and end among the places
  int gamma;  // float [S]: factor of s in ds
  int voxel;  // int [S]
  int held;   // int [V]: rows
  int sums;   // float2 [warps, channels]
  int rows;   // [kept, channels]: g
  int bytes = 0;

  __host__ __device__ Layout(const Guided& args, int kept, int element) {
    const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
    place = take(16 * views * tokens);
    pair = take(8 * views * tokens);
    cell = take(8 * views * tokens);
    gamma = take(4 * tokens);
    voxel = take(4 * tokens);
    held = take(4 * views);
    sums = take(8 * kRowWarps * kSlice);
    const int row = kept * kSlice * element, before = 4 * views * tokens;
    rows = take(row > before ? row : before);
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

template <typename Format>
__global__ void __launch_bounds__(kRowThreads, 3)
    rows_kernel(GuidedBackward args, GradientWork work, int kept) {
  extern __shared__ float4 room[];
  using T = typename Format::T;
  using Row = Kept<T>;
  using Pooled = typename Format::Row;
  using Gradient = typename Format::Gradient;
  char* shared = reinterpret_cast<char*>(room);
  const Layout layout(args, kept, sizeof(Row));
  float4* place = reinterpret_cast<float4*>(shared + layout.place);
  float2* pair = reinterpret_cast<float2*>(shared + layout.pair);
  float2* cells = reinterpret_cast<float2*>(shared + layout.cell);
  float* gamma = reinterpret_cast<float*>(shared + layout.gamma);
  int32_t* voxels = reinterpret_cast<int32_t*>(shared + layout.voxel);
  int32_t* held = reinterpret_cast<int32_t*>(shared + layout.held);
  float2* sums = reinterpret_cast<float2*>(shared + layout.sums);
  float* bents = reinterpret_cast<float*>(shared + layout.rows);  // [V, S]: by place, first of all

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels);
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int own = blockIdx.y * kSlice + 2 * lane, c = own < channels ? own : 0;
  const bool active = own < channels;

  for (int i = threadIdx.x; i < views; i += kRowThreads) held[i] = args.count[i * args.clouds + blockIdx.x];
  for (int i = threadIdx.x; i < tokens; i += kRowThreads) {
    voxels[i] = args.segment[views * rows + base + i];
    gamma[i] = work.gammas[base + i];
  }
  for (int v = 0; v < views; v++) {
    const int64_t layer = v * rows + base;
    for (int i = threadIdx.x; i < tokens; i += kRowThreads) {
      const int64_t token = v * rows + args.order[layer + i];
      place[v * tokens + i] = work.tokens[token];
      bents[v * tokens + i] = work.bents[token];
      const int32_t* start = args.start + v * (rows + 1) + base + i;
      const int begin = static_cast<int>(start[0] - base), end = static_cast<int>(start[1] - base);
      cells[v * tokens + i].y = bits(begin | end << 16);
    }
  }
  for (int i = threadIdx.x; i < views * tokens; i += kRowThreads) pair[i] = work.pairs[base * views + i];
  __syncthreads();
  for (int v = 0; v < views; v++) {
    for (int i = threadIdx.x; i < tokens; i += kRowThreads) {
      const uint32_t range = __float_as_uint(cells[v * tokens + i].y);
      float sum = 0.0f;
      for (uint32_t p = range & 0xffff; p < range >> 16; p++) sum += bents[v * tokens + p];
      cells[v * tokens + i].x = sum;
    }
  }
  __syncthreads();

  const char* grad = reinterpret_cast<const char*>(static_cast<const T*>(args.grad) + base * channels + c);
  const Pooled* const spaces = static_cast<const Pooled*>(work.space) + c;
  const char* space = reinterpret_cast<const char*>(spaces);
  float* grad_space = work.grad_space + base * channels + c;
  char* kept_g = shared + layout.rows + 2 * lane * sizeof(Row);
  for (int view = 0, last; view < views; view = last) {
    last = last_of_group(held, view, views, kept, kRowWarps);
    const int parts = kRowWarps / (last - view), part = warp % parts, v = view + warp / parts;
    if (v < last) {
      const Activation<T, 2, Format::kNarrow> activation(args, args.mean, args.deviation, v, c);
      const float4* places = place + v * tokens;
      const float2* cell = cells + v * tokens + part;
      const float2* const end = cells + v * tokens + held[v];
      const int64_t at = (v * rows + base + part) * channels + c, step = int64_t(parts) * channels;
      const Pooled* pooled = static_cast<const Pooled*>(work.rows) + at;
      Gradient* out = static_cast<Gradient*>(work.dy) + at;
      int row_at = part;
      for (int u = view; u < v; u++) row_at += held[u];
      char* g_at = kept_g + row_at * kSlice * sizeof(Row);
      Lane<2> plain = zero<2>(), scaled = zero<2>(), ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        if (cell + i * parts < end) ahead[i] = load<2>(pooled);
        pooled += step;
      }
      for (; cell < end; cell += parts) {
        const Lane<2> row = ahead[0];
#pragma unroll
        for (int i = 0; i + 1 < kAhead; i++) ahead[i] = ahead[i + 1];
        if (cell + kAhead * parts < end) ahead[kAhead - 1] = load<2>(pooled);
        pooled += step;
        Lane<2> dg = zero<2>();
        const float2 mine = *cell;
        const uint32_t range = __float_as_uint(mine.y);
        const float4 *p = places + (range & 0xffff), *stop = places + (range >> 16);
        // kCount tokens, all of them fetched before any is added; the last one again if there are fewer.
        const auto collect = [&](auto constant) {
          constexpr int kCount = decltype(constant)::value;
          float2 factor[kCount];
          Lane<2> g[kCount], s[kCount];
#pragma unroll
          for (int j = 0; j < kCount; j++) {
            const bool inside = p + j < stop;
            const float4 factors = inside ? p[j] : *p;
            factor[j] = inside ? make_float2(factors.x, factors.y) : make_float2(0.0f, 0.0f);
            g[j] = load<2>(reinterpret_cast<const T*>(grad + __float_as_uint(factors.z)));
            s[j] = load<2>(reinterpret_cast<const Pooled*>(space + __float_as_uint(factors.w)));
          }
#pragma unroll
          for (int j = 0; j < kCount; j++) {
            add(&dg, factor[j].x, g[j]);
            add(&dg, factor[j].y, s[j]);
          }
          p += kCount;
        };
        while (p < stop) {
          if (p + 1 == stop) {
            collect(std::integral_constant<int, 1>{});
          } else {
            collect(std::integral_constant<int, kTogether>{});
          }
        }
        Lane<2> g, dy;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const float normed = activation.normed(n, row.at[n]);
          const Gelu both = activation(n, normed);
          g.at[n] = both.value;
          dy.at[n] = fmaf(mine.x, both.value, dg.at[n]) * both.slope;
          plain.at[n] += dy.at[n];
          scaled.at[n] = fmaf(dy.at[n], normed, scaled.at[n]);
        }
        keep(reinterpret_cast<Row*>(g_at), g);
        g_at += parts * kSlice * sizeof(Row);
        if (active) store(out, dy);
        out += step;
      }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        sums[warp * kSlice + 2 * lane + n] = make_float2(plain.at[n], scaled.at[n]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (last - view) * kSlice; i += kRowThreads) {
      const int column = i % kSlice, of = i / kSlice, channel = blockIdx.y * kSlice + column;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int w = of * parts; w < (of + 1) * parts; w++) {
        sum.x += sums[w * kSlice + column].x;
        sum.y += sums[w * kSlice + column].y;
      }
      if (channel < channels) {
        work.parts[(blockIdx.x * args.layers + view + of) * channels + channel] = sum;
      }
    }
    for (int first = warp; first < tokens; first += kPair * kRowWarps) {
      Lane<2> ds[kPair];
#pragma unroll
      for (int i = 0; i < kPair; i++) {
        const int token = min(first + i * kRowWarps, tokens - 1), voxel = voxels[token];
        ds[i] = zero<2>();
        if (view > 0) {
          ds[i] = load<2>(grad_space + token * channels);
        } else if (voxel >= 0) {
          ds[i] = load<2>(spaces + voxel * channels);
        }
      }
#pragma unroll
      for (int i = 0; i < kPair; i++) {
        const int token = first + i * kRowWarps;
        if (token >= tokens) break;
        if (view == 0) {
          const float factor = gamma[token];
#pragma unroll
          for (int n = 0; n < 2; n++) ds[i].at[n] *= factor;
        }
        const float2* const pairs = pair + token * views;
        const auto collect = [&](int w) {
          const float2 factor = pairs[w];
          add(&ds[i], factor.x, load<2>(reinterpret_cast<const Row*>(kept_g + __float_as_uint(factor.y))));
        };
        if (last - view == kViews) {
#pragma unroll
          for (int w = 0; w < kViews; w++) collect(view + w);
        } else {
          for (int w = view; w < last; w++) collect(w);
        }
        if (active) store(grad_space + token * channels, ds[i]);
      }
    }
    __syncthreads();
  }
}

// What the tokens of a voxel want of it, and which of them have its maximum. A warp takes voxels one after
// the other, a lane eight channels. Grid: voxels, slices of channels.
template <typename Format>
__global__ void __launch_bounds__(kVoxelWarps* kWarp, 3)
    voxels_kernel(GuidedBackward args, GradientWork work) {
  using T = typename Format::T;
  using Pooled = typename Format::Row;
  using Gradient = typename Format::Gradient;
  __shared__ float2 sums[kVoxelWarps][kVoxelSlice];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int channels = static_cast<int>(args.channels), eights = eights_of(args);
  const int rows = static_cast<int>(args.clouds * args.tokens), layer = static_cast<int>(args.views);
  const int own = blockIdx.y * kVoxelSlice + 8 * lane;
  const bool active[2] = {own < channels, own + 4 < channels};
  const int c[2] = {active[0] ? own : 0, active[1] ? own + 4 : 0};
  const int32_t *order = args.order + int64_t(layer) * rows,
                *start = args.start + int64_t(layer) * (rows + 1);
  const T* const x = static_cast<const T*>(args.features);
  const Pooled* const pooled = static_cast<const Pooled*>(work.voxels);
  Gradient* const out = static_cast<Gradient*>(work.voxel_dy);
  Lane<4> plain[2] = {}, scaled[2] = {};
  const int first_voxel = (blockIdx.x * kVoxelWarps + warp) * kStretch;
  for (int voxel = first_voxel; voxel < min(first_voxel + kStretch, rows); voxel++) {
    const int begin = start[voxel], end = start[voxel + 1], at = voxel * channels;
    if (begin == end) continue;
    Lane<4> most[2], dg[2] = {}, row[2];
    int first[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++) row[h] = load<4>(pooled + at + c[h]);
    for (int p = begin; p < end; p += 2) {
      Lane<4> value[2][2], ds[2][2];
      int token[2];
#pragma unroll
      for (int j = 0; j < 2; j++) token[j] = order[min(p + j, end - 1)];
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          value[j][h] = load<4>(x + token[j] * channels + c[h]);
          ds[j][h] = load<4>(work.grad_space + token[j] * channels + c[h]);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (p + j == end) break;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          add(&dg[h], 1.0f, ds[j][h]);
#pragma unroll
          for (int n = 0; n < 4; n++) {
            if (p + j > begin && !exceeds(value[j][h].at[n], most[h].at[n])) continue;
            most[h].at[n] = value[j][h].at[n];
            first[h][n] = token[j];
          }
        }
      }
    }
    for (int p = begin; p < end; p++) {
      const int token = order[p];
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < 8; n++) bits |= (first[n / 4][n % 4] == token ? 1u : 0u) << n;
      if (active[0]) work.won[token * eights + own / 8] = static_cast<uint8_t>(bits);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Activation<T, 4, Format::kNarrow> activation(args, args.mean, args.deviation, layer, c[h]);
      Lane<4> dy;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float normed = activation.normed(n, row[h].at[n]);
        dy.at[n] = dg[h].at[n] * activation(n, normed).slope;
        plain[h].at[n] += dy.at[n];
        scaled[h].at[n] = fmaf(dy.at[n], normed, scaled[h].at[n]);
      }
      if (active[h]) store(out + at + c[h], dy);
    }
  }
#pragma unroll
  for (int n = 0; n < 8; n++) {
    sums[warp][8 * lane + n] = make_float2(plain[n / 4].at[n % 4], scaled[n / 4].at[n % 4]);
  }
  __syncthreads();
  const int column = threadIdx.x, channel = blockIdx.y * kVoxelSlice + column;
  if (column >= kVoxelSlice || channel >= channels) return;
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int w = 0; w < kVoxelWarps; w++) {
    sum.x += sums[w][column].x;
    sum.y += sums[w][column].y;
  }
  work.voxel_parts[int64_t(blockIdx.x) * channels + channel] = sum;
}

}  // namespace

int64_t rows_shared(const Guided& args) {
  const int element = args.dtype == Dtype::f32 ? 4 : 2;
  return Layout(args, kept_rows(args), element).bytes;
}

int row_gradients(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kSlice));
  const int bytes = static_cast<int>(rows_shared(args));
  const int kept = kept_rows(args);
  const int each = static_cast<int>(kThreads / args.views > 0 ? kThreads / args.views : 1);  // tokens
  const int factors = static_cast<int>((16 * each + 8) * args.views);
  const dim3 blocks(grid.x, static_cast<unsigned>((args.tokens + each - 1) / each));
  int error = allow_shared(factors_kernel, factors);
  if (error) return error;
  with_format(args, [&](auto format) {
    using Format = decltype(format);
    using T = typename Format::T;
    error = allow_shared(rows_kernel<Format>, bytes);
    if (error) return;
    factors_kernel<<<blocks, kThreads, factors, stream>>>(
        args, work, kept, pull_slices(args), static_cast<int>(sizeof(T)),
        static_cast<int>(sizeof(typename Format::Row)), static_cast<int>(kSlice * sizeof(Kept<T>)), each);
    rows_kernel<Format><<<grid, kRowThreads, bytes, stream>>>(args, work, kept);
  });
  return error ? error : voxel_gradients(args, work, stream);
}

int64_t voxel_parts(const Guided& args) {
  return (args.clouds * args.tokens + kVoxelWarps * kStretch - 1) / (kVoxelWarps * kStretch);
}

int voxel_gradients(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(voxel_parts(args)), slices_of(args, kVoxelSlice));
  with_format(args, [&](auto format) {
    voxels_kernel<decltype(format)><<<grid, kVoxelWarps * kWarp, 0, stream>>>(args, work);
  });
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
