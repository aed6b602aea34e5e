// Attention inside the cells: pairs of (token, head) in lanes, one key of the cell after the other.
#include "guided_aggregate/rows.h"

namespace any2point {
namespace A2P_ISA {
namespace {

constexpr int64_t kSlack = 16;  // a whole vector may be read and written past the last pair

// Queries, keys, values and, backward, the heads' gradients of one cell: [w][pairs], w the width of a head,
// pair token * H + head. And per pair the largest score, 1 / the softmax's sum, and (gradient . output).
struct Cell {
  int64_t heads, wide, pairs, room;
  float scale;
  float *q, *k, *v, *d, *most, *part, *delta;
  float *tiles, *acc, *score;  // [4 w, at least 2 w + 3][room], [2 w][room], [2][room], of a block of pairs

  Cell(const GuidedRows& args, float* scratch) {
    heads = args.heads;
    wide = args.inner / heads;
    scale = args.scale;
    const int64_t all = args.tokens * heads + kSlack;
    room = guided_attend_block(heads) * heads + kSlack;
    q = scratch;
    k = q + wide * all;
    v = k + wide * all;
    d = v + wide * all;
    most = d + wide * all;
    part = most + all;
    delta = part + all;
    tiles = delta + all;
    acc = tiles + (4 * wide > 2 * wide + 3 ? 4 * wide : 2 * wide + 3) * room;
    score = acc + 2 * wide * room;
  }
  int64_t stride() const { return pairs + kSlack; }
};

// to [w][pairs] = `from` of the cell's tokens, [M] each `step` apart.
void gather(const Cell& cell, const float* from, int64_t step, const int32_t* tokens, int64_t count,
            float* to) {
  for (int64_t i = 0; i < count; i++) {
    const float* row = from + tokens[i] * step;
    for (int64_t h = 0; h < cell.heads; h++) {
      for (int64_t j = 0; j < cell.wide; j++) {
        to[j * cell.stride() + i * cell.heads + h] = row[h * cell.wide + j];
      }
    }
  }
}

// tile [block] = the H values of one token, over and over.
A2P_INLINE void tile_of(const Cell& cell, const float* from, int64_t token, int64_t tokens, float* tile) {
  from += token * cell.heads;
  if (cell.heads > kLanes) {
    for (int64_t i = 0; i < tokens; i++) memcpy(tile + i * cell.heads, from, sizeof(float) * cell.heads);
    return;
  }
  const Float value = load(from);  // what is stored beyond H is overwritten by the next
  for (int64_t i = 0; i < tokens; i++) store(tile + i * cell.heads, value);
}
// All w rows of `from` [w][pairs] into tile [w][room].
A2P_INLINE void tiles_of(const Cell& cell, const float* from, int64_t token, int64_t tokens, float* tile) {
  for (int64_t j = 0; j < cell.wide; j++) {
    tile_of(cell, from + j * cell.stride(), token, tokens, tile + j * cell.room);
  }
}

// out [pairs] = factor * sum over j of a[j] b[j] of the pairs.
A2P_INLINE void products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t wide,
                         int64_t pairs, float factor, float* out) {
  for (int64_t p = 0; p < pairs; p += kLanes) {
    Float sum = mul(load(a + p), load(b + p));
    for (int64_t j = 1; j < wide; j++) sum = fma(load(a + j * a_stride + p), load(b + j * b_stride + p), sum);
    store(out + p, mul(sum, splat(factor)));
  }
}

// The largest score and the softmax's sum of the pairs of `tokens` tokens from `first` on; cell.acc [w][room]
// becomes their output.
void softmax(const Cell& cell, int64_t count, int64_t first, int64_t tokens) {
  const int64_t base = first * cell.heads, pairs = tokens * cell.heads, wide = cell.wide;
  float *most = cell.most + base, *part = cell.part + base;
  for (int64_t p = 0; p < pairs; p++) most[p] = -FLT_MAX;
  for (int64_t other = 0; other < count; other++) {
    tiles_of(cell, cell.k, other, tokens, cell.tiles);
    products(cell.q + base, cell.stride(), cell.tiles, cell.room, wide, pairs, cell.scale, cell.score);
    for (int64_t p = 0; p < pairs; p++) {
      most[p] = cell.score[p] > most[p] || cell.score[p] != cell.score[p] ? cell.score[p] : most[p];
    }
  }
  for (int64_t p = 0; p < pairs; p++) part[p] = 0;
  memset(cell.acc, 0, sizeof(float) * wide * cell.room);
  for (int64_t other = 0; other < count; other++) {
    tiles_of(cell, cell.k, other, tokens, cell.tiles);
    products(cell.q + base, cell.stride(), cell.tiles, cell.room, wide, pairs, cell.scale, cell.score);
    for (int64_t p = 0; p < pairs; p++) {
      cell.score[p] = exponential(cell.score[p] - most[p]);
      part[p] += cell.score[p];
    }
    tiles_of(cell, cell.v, other, tokens, cell.tiles);
    for (int64_t j = 0; j < wide; j++) {
      float *to = cell.acc + j * cell.room, *value = cell.tiles + j * cell.room;
      for (int64_t p = 0; p < pairs; p += kLanes) {
        store(to + p, fma(load(cell.score + p), load(value + p), load(to + p)));
      }
    }
  }
  for (int64_t p = 0; p < pairs; p++) part[p] = 1.0f / part[p];
  for (int64_t j = 0; j < wide; j++) {
    for (int64_t p = 0; p < pairs; p++) cell.acc[j * cell.room + p] *= part[p];
  }
}

}  // namespace

void attend(const GuidedRows& args, int64_t chunk, float* scratch) {
  const Chunk at(args, chunk);
  Cell cell(args, scratch);
  const int64_t step = args.views * 3 * args.inner, pad = args.width(), inner = args.inner;
  const float* query = args.qkv + at.layer * 3 * inner;
  const float* keep = args.keep ? args.keep + at.layer * args.rows() : nullptr;
  const int64_t block = guided_attend_block(args.heads);
  for (int64_t seg = at.first; seg < at.last; seg++) {
    const int64_t count = at.count(seg);
    if (count == 0) continue;
    const int32_t* tokens = at.tokens(seg);
    float* pooled = args.pooled + at.row(seg) * pad;
    float* hidden = args.hidden + at.layer * args.rows() * pad;
    if (count == 1) {  // a softmax of one
      memcpy(hidden + tokens[0] * pad, query + tokens[0] * step + 2 * inner, sizeof(float) * inner);
    } else {
      cell.pairs = count * cell.heads;
      gather(cell, query, step, tokens, count, cell.q);
      gather(cell, query + inner, step, tokens, count, cell.k);
      gather(cell, query + 2 * inner, step, tokens, count, cell.v);
      for (int64_t first = 0; first < count; first += block) {
        const int64_t some = count - first < block ? count - first : block;
        softmax(cell, count, first, some);
        for (int64_t i = 0; i < some; i++) {
          float* to = hidden + tokens[first + i] * pad;
          for (int64_t h = 0; h < cell.heads; h++) {
            for (int64_t j = 0; j < cell.wide; j++) {
              to[h * cell.wide + j] = cell.acc[j * cell.room + i * cell.heads + h];
            }
          }
        }
      }
    }
    for (int64_t m = 0; m < pad; m++) pooled[m] = 0;
    for (int64_t i = 0; i < count; i++) {
      float* row = hidden + tokens[i] * pad;
      const float factor = keep ? keep[tokens[i]] : 1.0f;
      row[inner] = 1;
      for (int64_t m = inner + 1; m < pad; m++) row[m] = 0;
      for (int64_t m = 0; m < pad; m++) pooled[m] += row[m] *= factor;
    }
    const float each = 1.0f / static_cast<float>(count);
    for (int64_t m = 0; m < pad; m++) pooled[m] *= each;
  }
}

// grad_hidden [S, K] of the cloud's tokens; writes the view's grad_qkv.
void attend_grad(const GuidedRows& args, int64_t chunk, const float* grad_hidden, float* grad_qkv,
                 float* scratch) {
  const Chunk at(args, chunk);
  Cell cell(args, scratch);
  const int64_t step = args.views * 3 * args.inner, pad = args.width(), inner = args.inner;
  const int64_t wide = cell.wide, heads = cell.heads, block = guided_attend_block(heads);
  const float* query = args.qkv + at.layer * 3 * inner;
  float* out = grad_qkv + at.layer * 3 * inner;
  const float* grad = grad_hidden - at.first * pad;
  const auto write = [&](const int32_t* tokens, int64_t first, int64_t some, const float* from,
                         int64_t part) {
    for (int64_t i = 0; i < some; i++) {
      float* to = out + tokens[first + i] * step + part * inner;
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t j = 0; j < wide; j++) to[h * wide + j] = from[j * cell.room + i * heads + h];
      }
    }
  };
  for (int64_t seg = at.first; seg < at.last; seg++) {
    const int64_t count = at.count(seg);
    if (count == 0) continue;
    const int32_t* tokens = at.tokens(seg);
    if (count == 1) {
      float* to = out + tokens[0] * step;
      memset(to, 0, sizeof(float) * 2 * inner);
      memcpy(to + 2 * inner, grad + tokens[0] * pad, sizeof(float) * inner);
      continue;
    }
    cell.pairs = count * heads;
    gather(cell, query, step, tokens, count, cell.q);
    gather(cell, query + inner, step, tokens, count, cell.k);
    gather(cell, query + 2 * inner, step, tokens, count, cell.v);
    gather(cell, grad, pad, tokens, count, cell.d);
    float *score = cell.score, *slope = cell.score + cell.room;
    float *values = cell.tiles, *keys = cell.tiles + wide * cell.room;
    for (int64_t first = 0; first < count; first += block) {  // queries in lanes
      const int64_t some = count - first < block ? count - first : block;
      const int64_t base = first * heads, pairs = some * heads;
      softmax(cell, count, first, some);
      products(cell.d + base, cell.stride(), cell.acc, cell.room, wide, pairs, 1.0f, cell.delta + base);
      memset(cell.acc, 0, sizeof(float) * wide * cell.room);
      for (int64_t other = 0; other < count; other++) {
        tiles_of(cell, cell.k, other, some, keys);
        tiles_of(cell, cell.v, other, some, values);
        products(cell.q + base, cell.stride(), keys, cell.room, wide, pairs, cell.scale, score);
        products(cell.d + base, cell.stride(), values, cell.room, wide, pairs, 1.0f, slope);
        for (int64_t p = 0; p < pairs; p++) {
          const float weight = exponential(score[p] - cell.most[base + p]) * cell.part[base + p];
          slope[p] = weight * (slope[p] - cell.delta[base + p]) * cell.scale;
        }
        for (int64_t j = 0; j < wide; j++) {
          float *to = cell.acc + j * cell.room, *key = keys + j * cell.room;
          for (int64_t p = 0; p < pairs; p += kLanes) {
            store(to + p, fma(load(slope + p), load(key + p), load(to + p)));
          }
        }
      }
      write(tokens, first, some, cell.acc, 0);
    }
    float *queries = cell.tiles, *grads = queries + wide * cell.room, *most = grads + wide * cell.room;
    float *part = most + cell.room, *delta = part + cell.room;
    for (int64_t first = 0; first < count; first += block) {  // keys in lanes
      const int64_t some = count - first < block ? count - first : block;
      const int64_t base = first * heads, pairs = some * heads;
      memset(cell.acc, 0, sizeof(float) * 2 * wide * cell.room);
      for (int64_t other = 0; other < count; other++) {
        tiles_of(cell, cell.q, other, some, queries);
        tiles_of(cell, cell.d, other, some, grads);
        tile_of(cell, cell.most, other, some, most);
        tile_of(cell, cell.part, other, some, part);
        tile_of(cell, cell.delta, other, some, delta);
        products(cell.k + base, cell.stride(), queries, cell.room, wide, pairs, cell.scale, score);
        products(cell.v + base, cell.stride(), grads, cell.room, wide, pairs, 1.0f, slope);
        for (int64_t p = 0; p < pairs; p++) {
          const float weight = exponential(score[p] - most[p]) * part[p];
          score[p] = weight;
          slope[p] = weight * (slope[p] - delta[p]) * cell.scale;
        }
        for (int64_t j = 0; j < wide; j++) {
          float *dk = cell.acc + j * cell.room, *dv = dk + wide * cell.room;
          for (int64_t p = 0; p < pairs; p += kLanes) {
            store(dk + p, fma(load(slope + p), load(queries + j * cell.room + p), load(dk + p)));
            store(dv + p, fma(load(score + p), load(grads + j * cell.room + p), load(dv + p)));
          }
        }
      }
      write(tokens, first, some, cell.acc, 1);
      write(tokens, first, some, cell.acc + wide * cell.room, 2);
    }
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
