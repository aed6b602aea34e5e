// The arithmetic of virtual projection, for the CPU and for CUDA: every rounding as in
// any2point/reference/virtual_project.py. NaN goes through minima, maxima and clamps, as in torch.
#pragma once

#include <float.h>
#include <math.h>

#include "virtual_project/kernel.h"

namespace any2point {

A2P_ALWAYS_INLINE float fused3(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(z, z, __fmaf_rn(y, y, x * x));
#else
  return __builtin_fmaf(z, z, __builtin_fmaf(y, y, x * x));
#endif
}
A2P_ALWAYS_INLINE float norm3(const float* v) { return sqrtf(fused3(v[0], v[1], v[2])); }

A2P_ALWAYS_INLINE float least(float a, float b) { return a < b || a != a ? a : b; }
A2P_ALWAYS_INLINE float most(float a, float b) { return a > b || a != a ? a : b; }
A2P_ALWAYS_INLINE float clamped(float a, float high) { return a < 0 ? 0.0f : a > high ? high : a; }
// The whole number at or below a (0 for NaN), in [0, high].
A2P_ALWAYS_INLINE int64_t whole(float a, int64_t high) {
  if (!(a > 0)) return 0;
  return a >= static_cast<float>(high) ? high : static_cast<int64_t>(a);
}
A2P_ALWAYS_INLINE float modulo(float a, float b) {
  const float rest = fmodf(a, b);
  return rest < 0 ? rest + b : rest;
}

// The direction of a line, of length one; zero stays zero.
A2P_ALWAYS_INLINE void unit_direction(const float* view, float* direction) {
  const float norm = norm3(view), divisor = norm > 0 ? norm : 1.0f;
  for (int a = 0; a < 3; a++) direction[a] = view[a] / divisor;
}
A2P_ALWAYS_INLINE float along(const float* center, const float* direction) {
  return 0.0f + center[0] * direction[0] + center[1] * direction[1] + center[2] * direction[2];
}
// `size`: the cloud's largest extent along an axis.
A2P_ALWAYS_INLINE void set_range(float low, float high, float size, Span* span) {
  const float bound = 1e-5f * size;
  span->low = low;
  span->extent = high - low;
  span->flat = span->extent <= (bound < FLT_MIN ? FLT_MIN : bound);
}
A2P_ALWAYS_INLINE float place_on_line(const VirtualProject& args, const Span& span, const float* center) {
  const float share = span.flat ? 0.5f : (along(center, span.direction) - span.low) / span.extent;
  return share * static_cast<float>(args.columns - 1);
}

// A coordinate of a center about the middle, before it is divided by the frame's scale.
A2P_ALWAYS_INLINE float middle_of(float low, float high) { return low / 2 + high / 2; }
A2P_ALWAYS_INLINE float scale_of(float largest) { return largest > FLT_MIN ? largest : 1.0f; }
A2P_ALWAYS_INLINE void in_frame(const Frame& frame, const float* center, float* to) {
  for (int a = 0; a < 3; a++) to[a] = (center[a] - frame.middle[a]) / frame.scale;
}
// sqrt(2) times the radius is where a camera with a 90 degree field of view has the whole sphere in view.
A2P_ALWAYS_INLINE float distance_of(float radius) {
  return 1.4142135623730951f * (radius < 1.0f ? 1.0f : radius);
}
struct Pixel {
  float column, row;
};
A2P_ALWAYS_INLINE Pixel place_in_image(const VirtualProject& args, const Frame& frame, const float* center,
                                       const float* view) {
  float p[3] = {center[0], center[1], center[2]}, seen[3];
  if (args.camera == 0) in_frame(frame, center, p);
  for (int a = 0; a < 3; a++) seen[a] = 0.0f + p[0] * view[a] + p[1] * view[3 + a] + p[2] * view[6 + a];
  const float depth = seen[2] + frame.distance, x = seen[0] / depth, y = seen[1] / depth;
  const float width = static_cast<float>(args.columns), height = static_cast<float>(args.rows);
  if (args.wrap) {
    return {modulo((x + 1) * width / 2 - 0.5f, width),
            modulo((y * height / width + 1) * height / 2 - 0.5f, height)};
  }
  const float right = static_cast<float>(args.columns - 1), bottom = static_cast<float>(args.rows - 1);
  return {clamped((x + 1) / 2 * right, right), clamped((y + 1) / 2 * bottom, bottom)};
}

A2P_ALWAYS_INLINE int64_t line_cell(const VirtualProject& args, float position) {
  return whole(position / args.cell, args.cell_columns - 1);
}
A2P_ALWAYS_INLINE int64_t image_cell(const VirtualProject& args, const Pixel& at) {
  return whole(at.row / args.cell, args.cell_rows - 1) * args.cell_columns +
         whole(at.column / args.cell, args.cell_columns - 1);
}

// Two rows of the table and their weights, of V views' mean.
A2P_ALWAYS_INLINE void line_corners(const VirtualProject& args, float position, int64_t* corner,
                                    float* weight) {
  const float coordinate = position * args.across;
  const float low = clamped(floorf(coordinate), static_cast<float>(args.width - 1));
  const float share = coordinate - low, views = static_cast<float>(args.view_count);
  corner[0] = whole(low, args.width - 1);
  corner[1] = whole(low + 1, args.width - 1);
  weight[0] = (1 - share) / views;
  weight[1] = share / views;
}
// Four; those outside of the table have weight zero.
A2P_ALWAYS_INLINE void image_corners(const VirtualProject& args, const Pixel& at, int64_t* corner,
                                     float* weight) {
  const float u = at.column * args.across;
  const float v = at.row * args.down;
  const float left = floorf(u), top = floorf(v), views = static_cast<float>(args.view_count);
  for (int c = 0; c < 4; c++) {
    const float i = left + (c & 1), j = top + (c >> 1);
    const bool inside =
        i >= 0 && i < static_cast<float>(args.width) && j >= 0 && j < static_cast<float>(args.height);
    const float share = inside ? (1 - fabsf(u - i)) * (1 - fabsf(v - j)) : 0.0f;
    corner[c] = whole(j, args.height - 1) * args.width + whole(i, args.width - 1);
    weight[c] = share / views;
  }
}

}  // namespace any2point
