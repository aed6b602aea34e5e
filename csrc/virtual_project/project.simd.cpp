// virtual_project on the CPU. All instruction sets give the same bits: every rounding is written down.
#include "common/simd.h"
#include "virtual_project/place.h"

namespace any2point {
namespace A2P_ISA {
namespace {

struct Range {
  float low[3], high[3];
};

Range range_of(const VirtualProject& args, const float* centers) {
  Range r;
  for (int a = 0; a < 3; a++) r.low[a] = r.high[a] = centers[a];
  for (int64_t s = 1; s < args.count; s++) {
    for (int a = 0; a < 3; a++) {
      r.low[a] = least(centers[3 * s + a], r.low[a]);
      r.high[a] = most(centers[3 * s + a], r.high[a]);
    }
  }
  return r;
}

Frame frame_of(const VirtualProject& args, const float* centers) {
  Frame frame{{0, 0, 0}, 1, args.camera};
  if (args.camera != 0) return frame;
  const Range range = range_of(args, centers);
  float largest = 0, radius = 0, p[3];
  for (int a = 0; a < 3; a++) frame.middle[a] = middle_of(range.low[a], range.high[a]);
  for (int64_t s = 0; s < args.count; s++) {
    for (int a = 0; a < 3; a++) largest = most(fabsf(centers[3 * s + a] - frame.middle[a]), largest);
  }
  frame.scale = scale_of(largest);
  for (int64_t s = 0; s < args.count; s++) {
    in_frame(frame, centers + 3 * s, p);
    radius = most(norm3(p), radius);
  }
  frame.distance = distance_of(radius);
  return frame;
}

// The encoding of one centre: the sum of its entries of the table, in order.
template <typename T>
void add_entries(const VirtualProject& args, const int64_t* corner, const float* weight, int64_t entries,
                 T* __restrict__ out) {
  constexpr int64_t kTile = 64;  // channels accumulated at once
  const T* __restrict__ table = static_cast<const T*>(args.table);
  float total[kTile];
  for (int64_t first = 0; first < args.channels; first += kTile) {
    const int64_t rest = args.channels - first, width = rest < kTile ? rest : kTile;
    for (int64_t c = 0; c < width; c++) total[c] = 0;
    for (int64_t k = 0; k < entries; k++) {
      const T* row = table + corner[k] * args.channels + first;
      const float w = weight[k];
      for (int64_t c = 0; c < width; c++) total[c] += w * widen(row[c]);
    }
    for (int64_t c = 0; c < width; c++) narrow(total[c], out + first + c);
  }
}

// kVectors vectors of channels, held in registers.
template <int kVectors>
A2P_INLINE void add_vectors(const float* table, int64_t channels, const int64_t* corner, const float* weight,
                            int64_t entries, float* out) {
  Float total[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++) total[j] = splat(0.0f);
  for (int64_t k = 0; k < entries; k++) {
    const float* row = table + corner[k] * channels;
    const Float w = splat(weight[k]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) total[j] = add(total[j], mul(w, load(row + j * kLanes)));
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++) store(out + j * kLanes, total[j]);
}

void add_entries(const VirtualProject& args, const int64_t* corner, const float* weight, int64_t entries,
                 float* out) {
  const float* table = static_cast<const float*>(args.table);
  const int64_t channels = args.channels;
  int64_t c = 0;
  for (; c + 8 * kLanes <= channels; c += 8 * kLanes) {
    add_vectors<8>(table + c, channels, corner, weight, entries, out + c);
  }
  for (; c + kLanes <= channels; c += kLanes) {
    add_vectors<1>(table + c, channels, corner, weight, entries, out + c);
  }
  for (; c < channels; c++) {
    float total = 0;
    for (int64_t k = 0; k < entries; k++) total += weight[k] * table[corner[k] * channels + c];
    out[c] = total;
  }
}

}  // namespace

void measure_clouds(const VirtualProject& args, Span* spans, Frame* frames, int64_t begin, int64_t end) {
  for (int64_t cloud = begin; cloud < end; cloud++) {
    const float* centers = args.centers + 3 * cloud * args.count;
    if (args.image) {
      frames[cloud] = frame_of(args, centers);
      continue;
    }
    const Range range = range_of(args, centers);
    float size = range.high[0] - range.low[0];
    for (int a = 1; a < 3; a++) size = most(range.high[a] - range.low[a], size);
    for (int64_t v = 0; v < args.view_count; v++) {
      Span* span = spans + cloud * args.view_count + v;
      unit_direction(args.views + 3 * v, span->direction);
      float low = along(centers, span->direction), high = low;
      for (int64_t s = 1; s < args.count; s++) {
        const float at = along(centers + 3 * s, span->direction);
        low = least(at, low);
        high = most(at, high);
      }
      set_range(low, high, size, span);
    }
  }
}

void project_centers(const VirtualProject& args, const Span* spans, const Frame* frames, int64_t* corner,
                     float* weight, int64_t begin, int64_t end) {
  const int64_t entries = args.view_count * args.corners();
  for (int64_t i = begin; i < end; i++) {
    const int64_t cloud = i / args.count, s = i % args.count;
    const float* center = args.centers + 3 * i;
    if (args.corner) {
      corner = args.corner + i * entries;
      weight = args.weight + i * entries;
    }
    for (int64_t v = 0; v < args.view_count; v++) {
      const int64_t at = (cloud * args.view_count + v) * args.count + s;
      if (args.image) {
        const Pixel pixel = place_in_image(args, frames[cloud], center, args.views + 9 * v);
        if (args.position) args.position[2 * at] = pixel.column, args.position[2 * at + 1] = pixel.row;
        if (args.cells) args.cells[at] = image_cell(args, pixel);
        image_corners(args, pixel, corner + 4 * v, weight + 4 * v);
      } else {
        const float position = place_on_line(args, spans[cloud * args.view_count + v], center);
        if (args.position) args.position[at] = position;
        if (args.cells) args.cells[at] = line_cell(args, position);
        line_corners(args, position, corner + 2 * v, weight + 2 * v);
      }
    }
    if (!args.encoding) continue;
    dispatch(args.dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) < 8) {
        add_entries(args, corner, weight, entries, static_cast<T*>(args.encoding) + i * args.channels);
      }
    });
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
