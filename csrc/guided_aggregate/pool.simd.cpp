// Rows of segments: pooled from tokens, activated, blended into tokens; and the way back.
#include "guided_aggregate/rows.h"

namespace any2point {
namespace A2P_ISA {
namespace {

// z = mean of the tokens + proj' pooled.
void pool_mean(const GuidedRows& args, const Chunk& at, int64_t seg) {
  const int64_t count = at.count(seg), stride = args.stride, used = args.inner + 1;
  const int32_t* tokens = at.tokens(seg);
  const float* proj = args.proj + at.layer * args.width() * stride;
  const float* pooled = args.pooled + at.row(seg) * args.width();
  float* z = args.z + at.row(seg) * stride;
  const Float each = splat(1.0f / static_cast<float>(count));
  each_block(stride, [&](auto n, int64_t c) {
    constexpr int N = decltype(n)::value;
    Float sum[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sum[j] = splat(0.0f);
    for (int64_t i = 0; i < count; i++) {
      const float* row = args.features + tokens[i] * stride + c;
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sum[j] = add(sum[j], load(row + j * kLanes));
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sum[j] = mul(sum[j], each);
    for (int64_t m = 0; m < used; m++) {
      const Float factor = splat(pooled[m]);
      const float* row = proj + m * stride + c;
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sum[j] = fma(factor, load(row + j * kLanes), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(z + c + j * kLanes, sum[j]);
  });
}

// row = token + proj' hidden; of a voxel, the token.
void attended(const GuidedRows& args, const Chunk& at, int64_t token, float* row) {
  const int64_t stride = args.stride, pad = args.width();
  memcpy(row, args.features + token * stride, sizeof(float) * stride);
  if (!at.is_view(args)) return;
  const float* hidden = args.hidden + (at.layer * args.rows() + token) * pad;
  for (int64_t m = 0; m <= args.inner; m++) {
    const Float factor = splat(hidden[m]);
    const float* proj = args.proj + (at.layer * pad + m) * stride;
    for (int64_t c = 0; c < stride; c += kLanes) store(row + c, fma(factor, load(proj + c), load(row + c)));
  }
}

// z = maximum + mean of the attended tokens. scratch: three rows.
void pool_maximum(const GuidedRows& args, const Chunk& at, int64_t seg, float* scratch) {
  const int64_t count = at.count(seg), stride = args.stride;
  const int32_t* tokens = at.tokens(seg);
  float *row = scratch, *sum = row + stride, *most = sum + stride;
  int32_t* argmax = args.argmax ? argmax_of(args, at.row(seg)) : nullptr;
  attended(args, at, tokens[0], sum);
  memcpy(most, sum, sizeof(float) * stride);
  if (argmax) {
    for (int64_t c = 0; c < stride; c++) argmax[c] = tokens[0];
  }
  for (int64_t i = 1; i < count; i++) {
    attended(args, at, tokens[i], row);
    if (argmax) {
      for (int64_t c = 0; c < stride; c++) {
        const bool more = row[c] > most[c] || (row[c] != row[c] && most[c] == most[c]);
        argmax[c] = more ? tokens[i] : argmax[c];
      }
    }
    for (int64_t c = 0; c < stride; c++) {
      most[c] = row[c] > most[c] || row[c] != row[c] ? row[c] : most[c];
      sum[c] += row[c];
    }
  }
  float* z = args.z + at.row(seg) * stride;
  const float each = 1.0f / static_cast<float>(count);
  for (int64_t c = 0; c < stride; c++) z[c] = most[c] + sum[c] * each;
}

A2P_INLINE float dot(const float* a, const float* b, int64_t stride) {
  Float sum = splat(0.0f);
  for (int64_t c = 0; c < stride; c += kLanes) sum = fma(load(a + c), load(b + c), sum);
  return sum_lanes(sum);
}

// Of three dots at once: a row of a view against the voxel's and against a gradient.
struct Agreement {
  float cosine, weight;
};
A2P_INLINE Agreement agreement(float product, float length, float other) {
  const float cosine = product / (length * other);
  return {cosine, (cosine + 1) / 2};
}

// alpha of a token: coefficient times the weight of each view in the blend.
void set_alpha(const GuidedRows& args, int64_t token) {
  float* alpha = args.alpha + token * args.views;
  if (!args.adaptive) {
    for (int64_t v = 0; v < args.views; v++) alpha[v] = args.coefficient / static_cast<float>(args.views);
    return;
  }
  const int64_t space = row_of(args, args.views, token);
  const float *s = activation_of(args, space), length = args.length[space];
  float total = 0;
  for (int64_t v = 0; v < args.views; v++) {
    const int64_t row = row_of(args, v, token);
    const float product = dot(activation_of(args, row), s, args.stride);
    alpha[v] = agreement(product, args.length[row], length).weight;
    total += alpha[v];
  }
  total = total < FLT_MIN ? FLT_MIN : total;
  for (int64_t v = 0; v < args.views; v++) alpha[v] = args.coefficient * (alpha[v] / total);
}

// acc += sum over views of alpha g.
template <int N>
A2P_INLINE void add_views(const GuidedRows& args, const float* factor, int64_t token, int64_t c, Float* acc) {
  for (int64_t v = 0; v < args.views; v++) {
    const float* row = activation_of(args, row_of(args, v, token)) + c;
    const Float each = splat(factor[v]);
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) acc[j] = fma(each, load(row + j * kLanes), acc[j]);
  }
}

// The largest g of a token's views, in a block of channels; NaN if one is.
A2P_INLINE void largest_view(const GuidedRows& args, int64_t token, float* most) {
  memcpy(most, activation_of(args, row_of(args, 0, token)), sizeof(float) * args.stride);
  for (int64_t v = 1; v < args.views; v++) {
    const float* row = activation_of(args, row_of(args, v, token));
    for (int64_t c = 0; c < args.stride; c++) {
      most[c] = row[c] > most[c] || row[c] != row[c] ? row[c] : most[c];
    }
  }
}

// dg += the gradient that a maximum over the views gives to `view`: of two equal views, taken in order, each
// gets half of what reaches them.
void add_maximum_grad(const GuidedRows& args, int64_t view, int64_t token, float* dg) {
  const float *own = activation_of(args, row_of(args, view, token)), *grad = args.grad + token * args.stride;
  for (int64_t c = 0; c < args.stride; c++) {
    float share = args.coefficient;
    bool before = false;
    for (int64_t v = 0; v < args.views; v++) {
      const float other = activation_of(args, row_of(args, v, token))[c];
      if (v == view) continue;
      if (!(other <= own[c])) share = 0;
      if (other == own[c]) {
        before |= v < view;
        share = v > view ? share / 2 : share;
      }
    }
    dg[c] += (before ? share / 2 : share) * grad[c];
  }
}

}  // namespace

void pool(const GuidedRows& args, int64_t chunk, float* mean, float* spread, float* scratch) {
  const Chunk at(args, chunk);
  const int64_t stride = args.stride;
  int64_t rows = 0;
  for (int64_t seg = at.first; seg < at.last; seg++) {
    if (at.count(seg) == 0) continue;
    rows++;
    if (at.pools_maximum(args)) {
      pool_maximum(args, at, seg, scratch);
    } else {
      pool_mean(args, at, seg);
    }
  }
  if (!mean) return;
  const Float each = splat(rows ? 1.0f / static_cast<float>(rows) : 0.0f);
  const auto z = [&](int64_t seg) { return args.z + at.row(seg) * stride; };
  for (int64_t c = 0; c < stride; c += kLanes) {
    Float sum = splat(0.0f), square = splat(0.0f);
    for (int64_t seg = at.first; seg < at.last; seg++) {
      if (at.count(seg)) sum = add(sum, load(z(seg) + c));
    }
    sum = mul(sum, each);
    for (int64_t seg = at.first; seg < at.last; seg++) {
      if (at.count(seg) == 0) continue;
      const Float off = sub(load(z(seg) + c), sum);
      square = fma(off, off, square);
    }
    store(mean + c, sum);
    store(spread + c, square);
  }
}

void activate(const GuidedRows& args, int64_t chunk) {
  const Chunk at(args, chunk);
  const int64_t stride = args.stride;
  const float *factor = args.factor + at.layer * stride, *mean = args.mean + at.layer * stride;
  const float* bias = args.bias + at.layer * stride;
  for (int64_t seg = at.first; seg < at.last; seg++) {
    if (at.count(seg) == 0) continue;
    const float* __restrict__ z = args.z + at.row(seg) * stride;
    float* __restrict__ g = args.g + at.row(seg) * stride;
    for (int64_t c = 0; c < stride; c++) {
      const float y = (z[c] - mean[c]) * factor[c] + bias[c];
      g[c] = y * normal(y).below;
    }
    const float length = sqrtf(dot(g, g, stride));
    args.length[at.row(seg)] = length < 1e-8f ? 1e-8f : length;
  }
}

void blend(const GuidedRows& args, float* out, int64_t begin, int64_t end) {
  const Float coefficient = splat(args.coefficient);
  for (int64_t t = begin; t < end; t++) {
    const float* x = args.features + t * args.stride;
    float* to = out + t * args.stride;
    if (args.ensemble == Ensemble::max) {
      largest_view(args, t, to);
      for (int64_t c = 0; c < args.stride; c += kLanes) {
        store(to + c, fma(coefficient, load(to + c), load(x + c)));
      }
      continue;
    }
    set_alpha(args, t);
    each_block(args.stride, [&](auto n, int64_t c) {
      constexpr int N = decltype(n)::value;
      Float sum[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sum[j] = load(x + c + j * kLanes);
      add_views<N>(args, args.alpha + t * args.views, t, c, sum);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) store(to + c + j * kLanes, sum[j]);
    });
  }
}

void weights_grad(const GuidedRows& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    if (!args.adaptive) {
      set_alpha(args, t);
      continue;
    }
    float *alpha = args.alpha + t * args.views, *beta = args.beta + t * args.views;
    float *gamma = args.gamma + t * args.views, total = 0, pulled = 0, delta = 0;
    const float* grad = args.grad + t * args.stride;
    const int64_t space = row_of(args, args.views, t);
    const float *s = activation_of(args, space), length = args.length[space];
    for (int64_t v = 0; v < args.views; v++) {
      const int64_t row = row_of(args, v, t);
      const float* g = activation_of(args, row);
      Float with_space = splat(0.0f), with_grad = splat(0.0f);
      for (int64_t c = 0; c < args.stride; c += kLanes) {
        const Float value = load(g + c);
        with_space = fma(value, load(s + c), with_space);
        with_grad = fma(value, load(grad + c), with_grad);
      }
      const Agreement at = agreement(sum_lanes(with_space), args.length[row], length);
      beta[v] = at.cosine;
      alpha[v] = at.weight;
      gamma[v] = args.coefficient * sum_lanes(with_grad);
      total += at.weight;
      pulled += at.weight * gamma[v];
    }
    total = total < FLT_MIN ? FLT_MIN : total;
    for (int64_t v = 0; v < args.views; v++) {
      const float own = args.length[row_of(args, v, t)], cosine = beta[v];
      const float du = (gamma[v] - pulled / total) / (2 * total);
      alpha[v] = args.coefficient * (alpha[v] / total);
      beta[v] = du / (own * length);
      gamma[v] = du * cosine / (own * own);
      delta += du * cosine / (length * length);
    }
    args.delta[t] = delta;
  }
}

void rows_grad(const GuidedRows& args, int64_t chunk, float* sum, float* sum_normed) {
  const Chunk at(args, chunk);
  const int64_t stride = args.stride, views = args.views, v = at.layer;
  const float *factor = args.factor + v * stride, *bias = args.bias + v * stride;
  const float *mean = args.mean + v * stride, *deviation = args.deviation + v * stride;
  for (int64_t c = 0; c < stride; c++) sum[c] = sum_normed[c] = 0;
  for (int64_t seg = at.first; seg < at.last; seg++) {
    const int64_t count = at.count(seg), row = at.row(seg);
    if (count == 0) continue;
    const int32_t* tokens = at.tokens(seg);
    float* __restrict__ dy = args.dz + row * stride;
    const float *g = args.g + row * stride, *__restrict__ z = args.z + row * stride;
    if (at.is_view(args) && args.ensemble == Ensemble::max) {
      memset(dy, 0, sizeof(float) * stride);
      for (int64_t i = 0; i < count; i++) add_maximum_grad(args, v, tokens[i], dy);
    } else {
      float own = 0;
      for (int64_t i = 0; i < count && args.adaptive; i++) {
        own -= at.is_view(args) ? args.gamma[tokens[i] * views + v] : args.delta[tokens[i]];
      }
      each_block(stride, [&](auto n, int64_t c) {
        constexpr int N = decltype(n)::value;
        Float acc[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[j] = mul(splat(own), load(g + c + j * kLanes));
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = tokens[i];
          if (!at.is_view(args)) {
            add_views<N>(args, args.beta + t * views, t, c, acc);
            continue;
          }
          const float *grad = args.grad + t * stride + c, *s = nullptr;
          const Float alpha = splat(args.alpha[t * views + v]);
#pragma GCC unroll 4
          for (int j = 0; j < N; j++) acc[j] = fma(alpha, load(grad + j * kLanes), acc[j]);
          if (!args.adaptive) continue;
          const Float beta = splat(args.beta[t * views + v]);
          s = activation_of(args, row_of(args, views, t)) + c;
#pragma GCC unroll 4
          for (int j = 0; j < N; j++) acc[j] = fma(beta, load(s + j * kLanes), acc[j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) store(dy + c + j * kLanes, acc[j]);
      });
    }
    for (int64_t c = 0; c < stride; c++) {
      const float y = (z[c] - mean[c]) * factor[c] + bias[c];
      const Normal at_y = normal(y);
      dy[c] *= at_y.below + y * 0.39894228f * at_y.bell;
    }
    for (int64_t c = 0; c < stride; c += kLanes) {
      const Float d = load(dy + c), normed = mul(sub(load(z + c), load(mean + c)), load(deviation + c));
      store(sum + c, add(load(sum + c), d));
      store(sum_normed + c, fma(d, normed, load(sum_normed + c)));
    }
  }
}

namespace {

// to [K] = proj dz.
void project_grad(const GuidedRows& args, int64_t view, const float* dz, float* to) {
  const int64_t pad = args.width(), stride = args.stride;
  const float* proj = args.proj + view * pad * stride;
  for (int64_t m = 0; m < pad; m += 4) {
    Float sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[j] = splat(0.0f);
    for (int64_t c = 0; c < stride && m <= args.inner; c += kLanes) {
      const Float value = load(dz + c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[j] = fma(value, load(proj + (m + j) * stride + c), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) to[m + j] = sum_lanes(sum[j]);
  }
}

// grad_proj [K, P] += the sum over segments of pooled dz'.
void add_proj_grad(const GuidedRows& args, const Chunk& at, float* grad_proj) {
  const int64_t pad = args.width(), stride = args.stride;
  for (int64_t m = 0; m <= args.inner; m += 4) {
    each_block(stride, [&](auto n, int64_t c) {
      constexpr int N = decltype(n)::value;
      Float acc[4][N];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[i][j] = splat(0.0f);
      }
      for (int64_t seg = at.first; seg < at.last; seg++) {
        if (at.count(seg) == 0) continue;
        const float* dz = args.dz + at.row(seg) * stride + c;
        const float* pooled = args.pooled + at.row(seg) * pad + m;
        Float value[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) value[j] = load(dz + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const Float factor = splat(pooled[i]);
#pragma GCC unroll 4
          for (int j = 0; j < N; j++) acc[i][j] = fma(factor, value[j], acc[i][j]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) store(grad_proj + (m + i) * stride + c + j * kLanes, acc[i][j]);
      }
    });
  }
}

}  // namespace

void pool_grad(const GuidedRows& args, int64_t chunk, float* grad_proj, float* grad_hidden, float* scratch) {
  const Chunk at(args, chunk);
  const int64_t stride = args.stride, pad = args.width(), layer = at.layer * stride;
  const float* keep = args.keep ? args.keep + at.layer * args.rows() : nullptr;
  float* dhidden = grad_hidden - at.first * pad;
  if (at.is_view(args)) memset(grad_proj, 0, sizeof(float) * pad * stride);
  for (int64_t seg = at.first; seg < at.last; seg++) {
    const int64_t count = at.count(seg), row = at.row(seg);
    if (count == 0) continue;
    const int32_t* tokens = at.tokens(seg);
    const float each = 1.0f / static_cast<float>(count);
    float* dz = args.dz + row * stride;
    const float* z = args.z + row * stride;
    for (int64_t c = 0; c < stride; c += kLanes) {
      const Float off = sub(load(z + c), load(args.mean + layer + c));
      const Float normed = mul(off, load(args.deviation + layer + c));
      const Float pull = fma(normed, load(args.m2 + layer + c), load(args.m1 + layer + c));
      store(dz + c, mul(load(args.factor + layer + c), sub(load(dz + c), pull)));
    }
    if (!at.is_view(args)) continue;
    if (!args.maximum) {
      project_grad(args, at.layer, dz, scratch);
      for (int64_t i = 0; i < count; i++) {
        const float factor = keep ? each * keep[tokens[i]] : each;
        for (int64_t m = 0; m < pad; m++) dhidden[tokens[i] * pad + m] = scratch[m] * factor;
      }
      continue;
    }
    const int32_t* argmax = argmax_of(args, at.row(seg));
    for (int64_t i = 0; i < count; i++) {
      const int32_t t = tokens[i];
      float *own = dhidden + t * pad, factor = keep ? keep[t] : 1.0f;
      for (int64_t c = 0; c < stride; c++) scratch[c] = argmax[c] == t ? dz[c] + dz[c] * each : dz[c] * each;
      project_grad(args, at.layer, scratch, own);
      const float* hidden = args.hidden + (at.layer * args.rows() + t) * pad;
      for (int64_t m = 0; m <= args.inner; m++) {
        own[m] *= factor;
        float* to = grad_proj + m * stride;
        for (int64_t c = 0; c < stride; c += kLanes) {
          store(to + c, fma(splat(hidden[m]), load(scratch + c), load(to + c)));
        }
      }
    }
  }
  if (at.is_view(args) && !args.maximum) add_proj_grad(args, at, grad_proj);
}

void features_grad(const GuidedRows& args, float* grad_features, int64_t begin, int64_t end) {
  const int64_t stride = args.stride;
  for (int64_t t = begin; t < end; t++) {
    float* to = grad_features + t * stride;
    memcpy(to, args.grad + t * stride, sizeof(float) * stride);
    for (int64_t layer = 0; layer < args.layers; layer++) {
      const int32_t seg = args.segment[layer * args.rows() + t];
      if (seg < 0) continue;
      const int32_t* start = args.start + layer * (args.rows() + 1) + seg;
      const float each = 1.0f / static_cast<float>(start[1] - start[0]);
      const int64_t row = row_of(args, layer, t);
      const float* __restrict__ dz = args.dz + row * stride;
      if (!args.maximum && layer < args.views) {
        for (int64_t c = 0; c < stride; c += kLanes) {
          store(to + c, fma(splat(each), load(dz + c), load(to + c)));
        }
        continue;
      }
      const int32_t* __restrict__ argmax = argmax_of(args, row);
      for (int64_t c = 0; c < stride; c++) {
        to[c] += argmax[c] == t ? dz[c] + dz[c] * each : dz[c] * each;
      }
    }
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
