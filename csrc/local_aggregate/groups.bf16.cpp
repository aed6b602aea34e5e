// Evaluation with operands in bfloat16, some thirty rows of a group at a time: x [30, C] in float32 (to add
// to) and in bfloat16 (to multiply), hidden layers in bfloat16 alone. The last unit leaves nothing but its
// maximum. Sums are in vectors of pair products (AVX512_BF16) or in tiles (AMX); while the tiles are at one
// block, the vectors finish the one before.
//
// Floor: the products of groups.simd.cpp, 13.2 GFLOP per cloud at the tokenizer's sizes: 25 ms of a Zen 5
// core (530 GFLOP/s), 6 ms of an Emerald Rapids core's tiles (2.3 TFLOP/s). Measured on one core: 32 ms on
// Zen 5 (float32 in the same run 63), products at 410 to 510 GFLOP/s and 3 ms of rows; 24 ms on Emerald
// Rapids (float32 97), products at 0.6 to 1.4 TFLOP/s, where sums leave the tiles through memory, and 6 ms of
// rows. Its pair products without tiles take 165 ms, so that common/isa.cpp leaves them out there.
//
// oneDNN's products alone (through torch, 84 to 672 rows) reach 270 to 380 and 120 to 870 GFLOP/s on these
// cores, and what follows a product would be passes of its own.
#include <math.h>
#include <string.h>

#include "local_aggregate/offsets.h"

namespace any2point {
namespace A2P_ISA {
namespace {

constexpr int64_t kPanel = 64;  // columns of a panel of weights: four vectors of sums

// Where rows of sums go to, and what is added to them.
struct Target {
  const float* bias;  // [columns]
  BFloat16* low;      // [rows, low_stride]
  float* wide;        // [rows, wide_stride]
  float* largest;     // [columns]
  float* wrong;       // [columns]: NaN where a sum was, else 0
  int64_t low_stride, wide_stride;
};

// hidden: ReLU into `low`. rows: ReLU of the sum with `wide`, into both. maximum: of the sum with `wide`.
enum class Into { hidden, rows, maximum };

template <int V>
struct Largest {
  Float value[V];
  __mmask16 wrong[V];
};

A2P_INLINE void store_low(BFloat16* to, Float first, Float second) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// The maxima of columns over the rows of a block, to and from memory.
template <int V>
A2P_INLINE void begin(const Target& to, int64_t column, Largest<V>* largest) {
  for (int v = 0; v < V; v++) {
    largest->value[v] = load(to.largest + column + v * kLanes);
    largest->wrong[v] = 0;
  }
}

template <int V>
A2P_INLINE void end(const Target& to, int64_t column, const Largest<V>& largest) {
  for (int v = 0; v < V; v++) {
    store(to.largest + column + v * kLanes, largest.value[v]);
    if (largest.wrong[v]) _mm512_mask_storeu_ps(to.wrong + column + v * kLanes, largest.wrong[v], splat(NAN));
  }
}

// One row of sums [V lanes] becomes what it is for.
template <int V, Into kInto>
A2P_INLINE void take(const Target& to, int64_t row, int64_t column, const Float* sum, Largest<V>* largest) {
  const Float zero = splat(0.0f);
#pragma GCC unroll 4
  for (int v = 0; v < V; v += 2) {
    Float pair[2] = {sum[v], sum[v + 1]};
    float* wide = to.wide + row * to.wide_stride + column + v * kLanes;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      if (kInto != Into::hidden) pair[i] = add(pair[i], load(wide + i * kLanes));
      if (kInto == Into::maximum) {
        largest->value[v + i] = max(pair[i], largest->value[v + i]);
        largest->wrong[v + i] |= _mm512_cmp_ps_mask(pair[i], pair[i], _CMP_UNORD_Q);
      } else {
        pair[i] = max(zero, pair[i]);  // NaN stays
      }
      if (kInto == Into::rows) store(wide + i * kLanes, pair[i]);
    }
    if (kInto != Into::maximum) {
      store_low(to.low + row * to.low_stride + column + v * kLanes, pair[0], pair[1]);
    }
  }
}

// The maximum of `wide` itself, where there are no units.
void largest_rows(const Target& to, int64_t count, int64_t columns) {
  const Float nothing[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t c = 0; c < columns; c += 2 * kLanes) {
    Largest<2> largest;
    begin(to, c, &largest);
    for (int64_t k = 0; k < count; k++) take<2, Into::maximum>(to, k, c, nothing, &largest);
    end(to, c, largest);
  }
}

#if defined(__AMX_BF16__)

// A block is two by two tiles of sums: up to 32 rows by 32 columns.
struct Tiles {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Rows of a group that go through the units together: as many tiles as it takes, all of the same height.
int64_t rows_at_once(int64_t count) {
  const int64_t blocks = (count + 31) / 32;
  return (count + 2 * blocks - 1) / (2 * blocks) * 2;
}
int64_t padded_rows(int64_t count) { return (count + 1) / 2 * 2; }

// GCC does not know what these instructions read and write.
A2P_INLINE void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 are the sums, 4 and 5 rows, 6 and 7 weights.
void begin_tiles(int64_t count) {
  Tiles tiles;
  memset(&tiles, 0, sizeof tiles);
  tiles.palette = 1;
  for (int i = 0; i < 8; i++) {
    tiles.row_bytes[i] = 64;
    tiles.rows[i] = (uint8_t)(i < 6 ? rows_at_once(count) / 2 : 16);
  }
  __asm__ volatile("" ::"r"(&tiles) : "memory");
  _tile_loadconfig(&tiles);
}
void end_tiles() { _tile_release(); }

// sums [rows, 32] = x [rows, depth] times 32 columns of a panel `width` wide, and meanwhile `last`, the sums
// of the 32 columns before `column`, become what they are for. Without x, or without `last`: the other alone.
template <Into kInto>
A2P_INLINE void block(const BFloat16* x, int64_t stride, const BFloat16* w, int64_t width, int64_t depth,
                      int64_t rows, float* sums, const Target& to, const float* last, int64_t column) {
  const int64_t steps = x ? depth / 32 : 1, each = (rows + steps - 1) / steps;
  Float bias[2];
  Largest<2> largest{};
  if (last) {
    bias[0] = load(to.bias + column - 32);
    bias[1] = load(to.bias + column - kLanes);
    if (kInto == Into::maximum) begin(to, column - 32, &largest);
  }
  memory_barrier();
  if (x) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t row = 0;
  for (int64_t i = 0; i < steps; i++) {
    if (x) {
      const BFloat16 *upper = x + 32 * i, *lower = upper + rows / 2 * stride, *columns = w + 32 * width * i;
      _tile_loadd(6, columns, 4 * width);
      _tile_loadd(4, upper, 2 * stride);
      _tile_loadd(7, columns + 32, 4 * width);
      _tile_loadd(5, lower, 2 * stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (last) {
      for (const int64_t end = row + each < rows ? row + each : rows; row < end; row++) {
        const Float sum[2] = {add(load(last + 32 * row), bias[0]),
                              add(load(last + 32 * row + kLanes), bias[1])};
        take<2, kInto>(to, row, column - 32, sum, &largest);
      }
    }
  }
  if (last && kInto == Into::maximum) end(to, column - 32, largest);
  if (x) {
    float* lower = sums + 16 * rows;
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, lower, 128);
    _tile_stored(3, lower + 16, 128);
  }
  memory_barrier();
}

// sums: room for two blocks.
template <Into kInto>
void layer(const BFloat16* x, int64_t stride, const PackedBf16& weights, int64_t in, int64_t out, Target to,
           int64_t rows, float* sums) {
  const int64_t depth = packed_bf16(in), columns = packed_bf16(out);
  to.bias = weights.bias;
  float* last = sums + 32 * 32;
  block<kInto>(x, stride, weights.weight, columns < kPanel ? columns : kPanel, depth, rows, last, to, nullptr,
               0);
  for (int64_t column = 32; column < columns; column += 32) {
    const int64_t first = column / kPanel * kPanel;
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    const BFloat16* w = weights.weight + first * depth + 2 * (column - first);
    block<kInto>(x, stride, w, width, depth, rows, sums, to, last, column);
    float* const other = last;
    last = sums;
    sums = other;
  }
  block<kInto>(nullptr, 0, nullptr, 0, 0, rows, nullptr, to, last, columns);
}

#else

constexpr int kRows = 6;  // a block is six rows by up to four vectors: 24 of the 32 registers are sums

int64_t padded_rows(int64_t count) { return (count + kRows - 1) / kRows * kRows; }
// Rows of a group that go through the units together: few enough for the first cache, near enough.
int64_t rows_at_once(int64_t count) { return padded_rows(count < 30 ? count : 30); }
void begin_tiles(int64_t) {}
void end_tiles() {}

template <int V, Into kInto>
void panel(const BFloat16* x, int64_t stride, const BFloat16* weights, int64_t pairs, const Target& to,
           int64_t column, int64_t rows) {
  for (int64_t row = 0; row < rows; row += kRows, x += kRows * stride) {
    Float sum[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = load(to.bias + column + v * kLanes);
    }
    const BFloat16* w = weights;
    for (int64_t p = 0; p < pairs; p++, w += 2 * V * kLanes) {
      __m512bh of[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) of[v] = (__m512bh)_mm512_loadu_si512(w + 2 * v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        int32_t pair;
        memcpy(&pair, x + r * stride + 2 * p, sizeof pair);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], value, of[v]);
      }
    }
    Largest<V> largest;
    if (kInto == Into::maximum) begin(to, column, &largest);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) take<V, kInto>(to, row + r, column, sum[r], &largest);
    if (kInto == Into::maximum) end(to, column, largest);
  }
}

template <Into kInto>
void layer(const BFloat16* x, int64_t stride, const PackedBf16& weights, int64_t in, int64_t out, Target to,
           int64_t rows, float*) {
  const int64_t depth = packed_bf16(in), columns = packed_bf16(out), pairs = (in + 1) / 2;
  const BFloat16* w = weights.weight;
  to.bias = weights.bias;
  for (int64_t first = 0; first < columns; first += kPanel) {
    if (columns - first >= kPanel) {
      panel<4, kInto>(x, stride, w, pairs, to, first, rows);
    } else {
      panel<2, kInto>(x, stride, w, pairs, to, first, rows);
    }
    w += depth * kPanel;
  }
}

#endif

// Sine and cosine of pi r, |r| <= 1/2, within 6e-7 and 7e-6: polynomials of least largest error.
constexpr float kSine[] = {3.1415820121765137f, -5.167142868041992f, 2.5418989658355713f,
                           -0.5546360015869141f};
constexpr float kCosine[] = {0.9999933242797852f, -4.933938026428223f, 4.04128360748291f,
                             -1.2221264839172363f};
// Beyond this many half turns their fraction has too few digits.
constexpr float kFar = 4096.0f;

struct SineCosine {
  Float sine, cosine;
};

// Of pi u, |u| <= kFar.
A2P_INLINE SineCosine sine_cosine(Float u) {
  // Adding 1.5 * 2^23 rounds to a whole number of half turns, and an odd one shows in the last bit.
  const Float round = splat(12582912.0f), turned = add(u, round);
  const Float sign = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(turned), 31));
  const Float r = sub(u, sub(turned, round)), square = mul(r, r);
  Float s = splat(kSine[3]), c = splat(kCosine[3]);
#pragma GCC unroll 4
  for (int i = 2; i >= 0; i--) {
    s = fma(s, square, splat(kSine[i]));
    c = fma(c, square, splat(kCosine[i]));
  }
  return {_mm512_xor_ps(mul(s, r), sign), _mm512_xor_ps(c, sign)};
}

A2P_INLINE Float widen_lanes(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

A2P_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : (__mmask16)((1u << count) - 1);
}

// A row of x as it comes and goes: features of a neighbour beside those of the centre, `half` channels each;
// x itself.
struct Row {
  const BFloat16 *there, *here;
  int64_t half;
  float* wide;
  BFloat16* low;
};

// x = features + encoding in 16 channels, all of the neighbour or all of the centre.
A2P_INLINE void put(const Row& row, int64_t at, Float encoding) {
  const BFloat16* from = at < row.half ? row.there + at : row.here + (at - row.half);
  const Float value = add(widen_lanes(_mm256_loadu_si256((const __m256i*)from)), encoding);
  store(row.wide + at, value);
  _mm256_storeu_si256((__m256i*)(row.low + at), (__m256i)_mm512_cvtneps_pbh(value));
}

// In the first `count` of 16 channels, whatever they are.
A2P_INLINE void put_some(const Row& row, int64_t at, int64_t count, Float encoding) {
  float lane[kLanes];
  store(lane, encoding);
  for (int64_t i = 0; i < count && i < kLanes; i++) {
    const int64_t c = at + i;
    row.wide[c] = widen(c < row.half ? row.there[c] : row.here[c - row.half]) + lane[i];
    narrow(row.wide[c], row.low + c);
  }
}

// Sine and cosine of one offset along one axis, `count` channels of the row each, from `at` on.
A2P_INLINE void put_encoding(const Row& row, int64_t at, int64_t count, const float* half_turns,
                             float offset) {
  const Float scaled = splat(offset);
  if (count % kLanes == 0 && row.half % kLanes == 0) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const SineCosine value = sine_cosine(mul(scaled, load(half_turns + i)));
      put(row, at + i, value.sine);
      put(row, at + count + i, value.cosine);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const SineCosine value = sine_cosine(mul(scaled, load(half_turns + i)));
    put_some(row, at + i, count - i, value.sine);
    put_some(row, at + count + i, count - i, value.cosine);
  }
}

// The same for angles too large for half turns.
__attribute__((noinline)) void put_far_encoding(const Row& row, int64_t at, int64_t count,
                                                const float* wavelength, float scaled) {
  for (int64_t i = 0; i < count; i++) {
    const float angle = scaled / wavelength[i];
    put_some(row, at + i, 1, splat(sinf(angle)));
    put_some(row, at + count + i, 1, splat(cosf(angle)));
  }
}

// Zeros in the columns beyond `count`: products of no weight with infinity are NaN.
void clear_rest(BFloat16* x, int64_t stride, int64_t count, int64_t rows) {
  if (count == stride) return;
  for (int64_t r = 0; r < rows; r++) memset(x + r * stride + count, 0, sizeof(BFloat16) * (stride - count));
}

// What a thread holds of a group. Strides and columns are whole numbers of 32.
struct Room {
  float *half_turns, *offset, *wide, *largest, *wrong, *sums;
  BFloat16 *low, *hidden, *nothing;  // nothing: zeros, features of a point that is not there
  float fastest;                     // the most half turns per offset
  int64_t x_stride, hidden_stride, bytes;
};

Room make_room(const LocalAggregateBf16& args, void* scratch) {
  const int64_t count = args.from.neighbors, rows = rows_at_once(count);
  Room room{};
  room.x_stride = packed_bf16(args.from.width);
  room.hidden_stride = packed_bf16(args.hidden);
  // Whole cache lines, from a whole one on.
  char* at = (char*)(((uintptr_t)scratch + 63) / 64 * 64);
  char* const first = at;
  const auto take_bytes = [&at](int64_t bytes) {
    char* own = at;
    at += (bytes + 63) / 64 * 64;
    return own;
  };
  room.half_turns = (float*)take_bytes(4 * packed_bf16(args.from.width / 6));
  room.offset = (float*)take_bytes(4 * 3 * count);
  room.largest = (float*)take_bytes(4 * room.x_stride);
  room.wrong = (float*)take_bytes(4 * room.x_stride);
  room.sums = (float*)take_bytes(4 * 2 * 32 * 32);
  room.wide = (float*)take_bytes(4 * rows * room.x_stride);
  room.low = (BFloat16*)take_bytes(2 * rows * room.x_stride);
  room.nothing = (BFloat16*)take_bytes(args.from.width);
  room.hidden = (BFloat16*)take_bytes(2 * rows * room.hidden_stride);
  room.bytes = at - first + 63;
  return room;
}

// Rows [first, first + rows) of x of one group; those that it does not have repeat the first.
void build_rows(const LocalAggregateBf16& args, int64_t group, const Room& room, int64_t first,
                int64_t rows) {
  const Neighborhoods& from = args.from;
  const int64_t half = from.width / 2, count = from.width / 6;
  const Members members = members_of(from, group);
  const auto features = [&](int64_t row) { return row < 0 ? room.nothing : args.features + half * row; };
  for (int64_t r = 0; r < rows; r++) {
    const int64_t k = first + r < from.neighbors ? first + r : first;
    const Row row{features(member(members, k)), features(members.middle), half, room.wide + r * room.x_stride,
                  room.low + r * room.x_stride};
    for (int axis = 0; axis < 3; axis++) {
      const float offset = room.offset[3 * k + axis];
      const int64_t at = 2 * count * axis;
      if (fabsf(offset) * room.fastest > kFar) {
        put_far_encoding(row, at, count, from.wavelength, from.beta * offset);
      } else {
        put_encoding(row, at, count, room.half_turns, offset);
      }
    }
    put_some(row, 6 * count, from.width - 6 * count, splat(0.0f));
  }
}

}  // namespace

int64_t groups_scratch(const LocalAggregateBf16& args) { return make_room(args, nullptr).bytes; }

void pack_columns(const float* weight, const float* bias, int64_t out, int64_t in, BFloat16* packed,
                  float* packed_bias) {
  const int64_t columns = packed_bf16(out), depth = packed_bf16(in);
  for (int64_t j = 0; j < columns; j++) {
    const int64_t first = j / kPanel * kPanel;
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    BFloat16* to = packed + first * depth + 2 * (j - first);
    for (int64_t d = 0; d < depth; d += 32, to += 32 * width) {
      const int64_t left = j < out && d < in ? in - d : 0;
      const float* from = weight + (left ? j * in + d : 0);
      BFloat16 low[32];
      store_low(low, _mm512_maskz_loadu_ps(first_lanes(left), from),
                _mm512_maskz_loadu_ps(left > kLanes ? first_lanes(left - kLanes) : 0, from + kLanes));
      for (int i = 0; i < 16; i++) memcpy(to + 2 * i * width, low + 2 * i, 2 * sizeof(BFloat16));
    }
    packed_bias[j] = j < out ? bias[j] : 0.0f;
  }
}

void aggregate_groups(const LocalAggregateBf16& args, void* scratch, int64_t begin, int64_t end) {
  const int64_t width = args.from.width, count = args.from.neighbors, most = rows_at_once(count);
  Room room = make_room(args, scratch);
  // Columns beyond the rows' own, which the products read.
  memset(room.wide, 0, sizeof(float) * most * room.x_stride);
  memset(room.low, 0, sizeof(BFloat16) * most * room.x_stride);
  memset(room.wrong, 0, sizeof(float) * room.x_stride);
  memset(room.nothing, 0, width);
  for (int64_t i = 0; i < packed_bf16(width / 6); i++) {
    room.half_turns[i] = i < width / 6 ? (float)(args.from.beta / (M_PI * args.from.wavelength[i])) : 0.0f;
    room.fastest = fmaxf(room.fastest, fabsf(room.half_turns[i]));
  }
  Target x{};
  x.low = room.low;
  x.low_stride = room.x_stride;
  x.wide = room.wide;
  x.wide_stride = room.x_stride;
  x.largest = room.largest;
  x.wrong = room.wrong;
  Target hidden{};
  hidden.low = room.hidden;
  hidden.low_stride = room.hidden_stride;
  begin_tiles(count);
  for (int64_t group = begin; group < end; group++) {
    for (int64_t c = 0; c < room.x_stride; c += kLanes) store(room.largest + c, splat(-INFINITY));
    normalized_offsets(args.from, group, room.offset);
    for (int64_t first = 0; first < count; first += most) {
      const int64_t rows = padded_rows(count - first < most ? count - first : most);
      build_rows(args, group, room, first, rows);
      for (int64_t u = 0; u < args.unit_count; u++) {
        const FoldedUnitBf16& unit = args.units[u];
        layer<Into::hidden>(room.low, room.x_stride, unit.in, width, unit.hidden, hidden, rows, room.sums);
        clear_rest(room.hidden, room.hidden_stride, unit.hidden, rows);
        if (u + 1 < args.unit_count) {
          layer<Into::rows>(room.hidden, room.hidden_stride, unit.out, unit.hidden, width, x, rows,
                            room.sums);
          clear_rest(room.low, room.x_stride, width, rows);
        } else {
          layer<Into::maximum>(room.hidden, room.hidden_stride, unit.out, unit.hidden, width, x, rows,
                               room.sums);
        }
      }
      if (args.unit_count == 0) largest_rows(x, rows, room.x_stride);
    }
    const Float least = splat(args.unit_count ? 0.0f : -INFINITY);  // the last unit's ReLU
    BFloat16* out = args.out + group * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const Float value = add(max(least, load(room.largest + c)), load(room.wrong + c));
      _mm256_mask_storeu_epi16(out + c, first_lanes(width - c), (__m256i)_mm512_cvtneps_pbh(value));
      store(room.wrong + c, splat(0.0f));
    }
  }
  end_tiles();
}

}  // namespace A2P_ISA
}  // namespace any2point
