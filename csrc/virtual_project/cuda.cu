// virtual_project on CUDA: one kernel. A block has some centres of one cloud. Its warps first measure the
// whole cloud, each some lines (or the frame of the images); then every thread places a centre in a view, and
// last each adds up 16 bytes of an encoding at a time, entry by entry.
//
// Measured on an H200, replayed as a CUDA graph: 32 clouds of 128 centres, 768 channels and 6 views 21 us for
// lines and 38 us for images (the composition of torch ops 100 and 268 us), one cloud of lines 9 us (76 us).
#include "common/grid.cuh"
#include "virtual_project/place.h"

namespace any2point {
namespace {

// Few centres per block: what a block waits for is the table, again and again. But every block measures its
// cloud, so there are not many of them.
constexpr int kFewest = 4, kMostBlocks = 64;

__device__ float warp_least(float a) {
  for (int d = kWarp / 2; d > 0; d /= 2) a = least(__shfl_xor_sync(kAll, a, d), a);
  return a;
}
__device__ float warp_most(float a) {
  for (int d = kWarp / 2; d > 0; d /= 2) a = most(__shfl_xor_sync(kAll, a, d), a);
  return a;
}

struct Extremes {
  float low, high;
};
// Of value(s) over the centres of a cloud, in every lane.
template <typename Value>
__device__ Extremes extremes(const VirtualProject& args, Value value) {
  float low = value(0), high = low;
#pragma unroll 4
  for (int64_t s = threadIdx.x % kWarp; s < args.count; s += kWarp) {
    const float at = value(s);
    low = least(at, low);
    high = most(at, high);
  }
  return {warp_least(low), warp_most(high)};
}

// Along the three axes, in one pass.
__device__ void axes_of(const VirtualProject& args, const float* centers, Extremes axes[3]) {
  for (int a = 0; a < 3; a++) axes[a] = {centers[a], centers[a]};
#pragma unroll 4
  for (int64_t s = threadIdx.x % kWarp; s < args.count; s += kWarp) {
#pragma unroll
    for (int a = 0; a < 3; a++) {
      const float at = centers[3 * s + a];
      axes[a] = {least(at, axes[a].low), most(at, axes[a].high)};
    }
  }
#pragma unroll
  for (int a = 0; a < 3; a++) axes[a] = {warp_least(axes[a].low), warp_most(axes[a].high)};
}

__device__ void measure_lines(const VirtualProject& args, const float* centers, Span* spans) {
  Extremes axes[3];
  axes_of(args, centers, axes);
  float size = axes[0].high - axes[0].low;
  for (int a = 1; a < 3; a++) size = most(axes[a].high - axes[a].low, size);
  for (int64_t v = threadIdx.x / kWarp; v < args.view_count; v += kThreads / kWarp) {
    Span span;
    unit_direction(args.views + 3 * v, span.direction);
    const Extremes line = extremes(args, [&](int64_t s) { return along(centers + 3 * s, span.direction); });
    set_range(line.low, line.high, size, &span);
    if (threadIdx.x % kWarp == 0) spans[v] = span;
  }
}

// Every warp for itself.
__device__ Frame measure_frame(const VirtualProject& args, const float* centers) {
  Frame frame{{0, 0, 0}, 1, args.camera};
  if (args.camera != 0) return frame;
  Extremes axes[3];
  axes_of(args, centers, axes);
  for (int a = 0; a < 3; a++) frame.middle[a] = middle_of(axes[a].low, axes[a].high);
  const Extremes largest = extremes(args, [&](int64_t s) {
    float size = 0;
    for (int a = 0; a < 3; a++) size = most(fabsf(centers[3 * s + a] - frame.middle[a]), size);
    return size;
  });
  frame.scale = scale_of(largest.high);
  const Extremes radius = extremes(args, [&](int64_t s) {
    float p[3];
    in_frame(frame, centers + 3 * s, p);
    return norm3(p);
  });
  frame.distance = distance_of(radius.high);
  return frame;
}

// Bytes of shared memory per centre of a block, and per block.
__host__ __device__ int64_t entry_bytes(const VirtualProject& args) {
  return args.view_count * args.corners() * (sizeof(int64_t) + sizeof(float));
}
__host__ __device__ int64_t span_bytes(const VirtualProject& args) {
  return args.image ? 0 : (args.view_count * sizeof(Span) + 7) / 8 * 8;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    virtual_project_kernel(VirtualProject args, int64_t tiles, int64_t tile, int room) {
  extern __shared__ int64_t shared[];
  Span* spans = reinterpret_cast<Span*>(shared);
  int64_t* corner = shared + span_bytes(args) / 8;
  const int64_t cloud = blockIdx.x / tiles, first = blockIdx.x % tiles * tile;
  const int64_t end = first + tile < args.count ? first + tile : args.count;
  const int64_t corners = args.corners(), entries = args.view_count * corners;
  float* weight = reinterpret_cast<float*>(corner + room * entries);
  const float* centers = args.centers + 3 * cloud * args.count;

  Frame frame;
  if (args.image) {
    frame = measure_frame(args, centers);
  } else {
    measure_lines(args, centers, spans);
  }
  __syncthreads();
  // As many centres at a time as there is room for.
  for (int64_t begin = first; begin < end; begin += room) {
    const int64_t here = begin + room < end ? room : end - begin;
    for (int64_t i = threadIdx.x; i < here * args.view_count; i += kThreads) {
      const int64_t s = begin + i / args.view_count, v = i % args.view_count;
      const int64_t at = (cloud * args.view_count + v) * args.count + s;
      if (args.image) {
        const Pixel pixel = place_in_image(args, frame, centers + 3 * s, args.views + 9 * v);
        if (args.position) args.position[2 * at] = pixel.column, args.position[2 * at + 1] = pixel.row;
        if (args.cells) args.cells[at] = image_cell(args, pixel);
        image_corners(args, pixel, corner + i * 4, weight + i * 4);
      } else {
        const float position = place_on_line(args, spans[v], centers + 3 * s);
        if (args.position) args.position[at] = position;
        if (args.cells) args.cells[at] = line_cell(args, position);
        line_corners(args, position, corner + i * 2, weight + i * 2);
      }
    }
    __syncthreads();
    const int64_t row = cloud * args.count + begin;  // of the B * S
    if (args.corner) {
      for (int64_t i = threadIdx.x; i < here * entries; i += kThreads) {
        args.corner[row * entries + i] = corner[i];
        args.weight[row * entries + i] = weight[i];
      }
    }
    if (args.encoding) {
      const int64_t columns = args.channels / V;
      const auto* table = static_cast<const Pack<T, V>*>(args.table);
      auto* out = static_cast<Pack<T, V>*>(args.encoding) + row * columns;
      for (int64_t i = threadIdx.x; i < here * columns; i += kThreads) {
        const int64_t s = i / columns, c = i % columns;
        float total[V] = {};
#pragma unroll 6
        for (int64_t k = s * entries; k < (s + 1) * entries; k++) {
          const Pack<T, V> values = table[corner[k] * columns + c];
          const float w = weight[k];
#pragma unroll
          for (int j = 0; j < V; j++) total[j] += w * widen(values.at[j]);
        }
        Pack<T, V> sum;
#pragma unroll
        for (int j = 0; j < V; j++) narrow(total[j], sum.at + j);
        out[i] = sum;
      }
    }
    __syncthreads();
  }
}

template <typename T, int V>
int launch(const VirtualProject& args, int64_t clouds, cudaStream_t stream) {
  // Shared memory without asking for more than every device has: 48 kB hold kMostCorners and their spans.
  const int64_t bytes = entry_bytes(args), spans = span_bytes(args);
  const int64_t each = (args.count + kMostBlocks - 1) / kMostBlocks, tile = each > kFewest ? each : kFewest;
  const int64_t fit = (47 * 1024 - spans) / bytes;
  const int64_t some = tile < 16 ? tile : 16, room = fit < 1 ? 1 : fit < some ? fit : some;
  const int64_t tiles = (args.count + tile - 1) / tile;
  virtual_project_kernel<T, V>
      <<<static_cast<unsigned>(clouds * tiles), kThreads, spans + room * bytes, stream>>>(
          args, tiles, tile, static_cast<int>(room));
  return cudaGetLastError();
}

}  // namespace

int virtual_project_cuda(const VirtualProject& args, int64_t clouds, void* stream_) {
  if (clouds == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!args.encoding) return launch<float, 1>(args, clouds, stream);
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      constexpr int V = 16 / sizeof(T);
      const bool packs = args.channels % V == 0 && aligned(args.table, 16) && aligned(args.encoding, 16);
      error = packs ? launch<T, V>(args, clouds, stream) : launch<T, 1>(args, clouds, stream);
    }
  });
  return error;
}

}  // namespace any2point
