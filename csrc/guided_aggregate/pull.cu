// How the gradient pulls at the views of every token: products G g_v over slices of channels. A block holds
// a cloud's slice, a warp takes up to 32 places of a view's order and their rows one after the other.
#include "guided_aggregate/gradient.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kPairs = kPulled / kSlice;

template <typename Format>
__global__ void __launch_bounds__(kPullWarps* kWarp, 1) pull_kernel(GuidedBackward args, GradientWork work) {
  using T = typename Format::T;
  using Row = typename Format::Row;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int64_t rows = args.clouds * args.tokens, channels = args.channels, cloud = blockIdx.x;
  const int base = static_cast<int>(cloud * tokens);
  int c[kPairs], active = 0;
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    c[i] = blockIdx.y * kPulled + i * kSlice + 2 * lane;
    active += c[i] < channels;
    c[i] = c[i] < channels ? c[i] : 0;
  }
  const T* grad = static_cast<const T*>(args.grad);
  Row* const normed = static_cast<Row*>(work.rows);
  // The activation of two channels of a row, which waits normalised for the passes to come.
  const auto activate = [&](const auto& activation, int64_t at, bool inside, const Lane<2>& z) {
    Lane<2> row, g;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      row.at[n] = activation.normed(n, z.at[n]);
      g.at[n] = inside ? activation(n, row.at[n]).value : 0.0f;
    }
    if (Format::kNarrow && inside) keep(normed + at, row);
    return g;
  };
  const int chunks = (tokens + kWarp - 1) / kWarp;
  for (int task = warp; task < views * chunks; task += kPullWarps) {
    const int view = task / chunks, first = base + task % chunks * kWarp;
    const int32_t *order = args.order + view * rows, *start = args.start + view * (rows + 1);
    const bool inside = first + lane < base + tokens;
    const int mine = inside ? order[first + lane] : base;
    const int segment = args.segment[view * rows + mine];
    const int begin = start[segment], end = start[segment + 1];
    unsigned heads = __ballot_sync(kAll, inside && begin == first + lane);
    if (heads == 0) continue;
    const Activation<T, 2, false> activation[kPairs] = {{args, args.mean, args.deviation, view, c[0]},
                                                        {args, args.mean, args.deviation, view, c[1]},
                                                        {args, args.mean, args.deviation, view, c[2]}};
    const int64_t layer = view * rows * channels;
    float* pulls = work.pulls + (int64_t(blockIdx.y) * views + view) * rows;
    Lane<2> next[kPairs];
    int64_t at = 0;  // of the row that was fetched
    const auto fetch = [&](int head) {
      at = layer + __shfl_sync(kAll, segment, head) * channels;
#pragma unroll
      for (int i = 0; i < kPairs; i++) next[i] = load<2>(work.z + at + c[i]);
    };
    fetch(__ffs(heads) - 1);
    while (heads) {
      const int head = __ffs(heads) - 1, count = __shfl_sync(kAll, end, head) - (first + head);
      Lane<2> g[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; i++) g[i] = activate(activation[i], at + c[i], i < active, next[i]);
      heads &= heads - 1;
      if (heads) fetch(__ffs(heads) - 1);
      // kCount tokens of the cell from place `from` on; the last one again if there are fewer.
      const auto pull = [&](int from, auto constant) {
        constexpr int kCount = decltype(constant)::value;
        float value[kCount];
        int token[kCount];
#pragma unroll
        for (int j = 0; j < kCount; j++) {
          const int place = head + min(from + j, count - 1);
          token[j] = place < kWarp ? __shfl_sync(kAll, mine, place) : order[first + place];
        }
#pragma unroll
        for (int j = 0; j < kCount; j++) {
          const T* row = grad + token[j] * channels;
          value[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < kPairs; i++) {
            const Lane<2> d = load<2>(row + c[i]);
            value[j] = fmaf(g[i].at[0], d.at[0], fmaf(g[i].at[1], d.at[1], value[j]));
          }
        }
        const float sum = sums_of_warp(value, lane);
        constexpr int kEach = kWarp / kCount;
        int to = token[0];
#pragma unroll
        for (int j = 1; j < kCount; j++) to = lane / kEach == j ? token[j] : to;
        if (lane % kEach == 0 && from + lane / kEach < count) pulls[to] = sum;
      };
      for (int from = 0; from < count;) {
        if (count - from > 2) {
          pull(from, std::integral_constant<int, 4>{});
          from += 4;
        } else {
          pull(from, std::integral_constant<int, 2>{});
          from += 2;
        }
      }
    }
  }
  // Voxels are dealt to the clouds in turn, and those of a cloud to its warps.
  const int32_t* start = args.start + views * (rows + 1);
  const Activation<T, 2, false> activation[kPairs] = {{args, args.mean, args.deviation, views, c[0]},
                                                      {args, args.mean, args.deviation, views, c[1]},
                                                      {args, args.mean, args.deviation, views, c[2]}};
  Row* const space = static_cast<Row*>(work.space);
  for (int k = warp; k < tokens; k += kPullWarps * kWarp) {
    const int own = k + lane * kPullWarps;
    const int64_t voxel = own * args.clouds + cloud;
    unsigned held = __ballot_sync(kAll, own < tokens && start[voxel] < start[voxel + 1]);
    for (; held; held &= held - 1) {
      const int64_t at = ((k + (__ffs(held) - 1) * kPullWarps) * args.clouds + cloud) * channels;
      const int64_t row = views * rows * channels + at;
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if (i >= active) continue;
        const Lane<2> z = load<2>(work.z + row + c[i]);
        keep(space + at + c[i], activate(activation[i], row + c[i], true, z));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    if (cloud == 0 && warp == 0 && i < active) store(space + rows * channels + c[i], zero<2>());
  }
}

}  // namespace

int pull_views(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kPulled));
  with_format(args, [&](auto format) {
    pull_kernel<decltype(format)><<<grid, kPullWarps * kWarp, 0, stream>>>(args, work);
  });
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
