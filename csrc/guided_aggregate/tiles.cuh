// The backward pass by tiles of 16 rows: 16-bit features of clouds of up to kTokens tokens, means over cells.
// A warp takes a tile and 64 channels in the fragments of tensor cores.
//
// In the order of a view's cells a tile of rows has the places [begin, end) and no others, so that products
// of rows with tokens take these alone: as many for few cells with many tokens as for many with few. What has
// the order of the tokens themselves needs no sorting, since every lane gives an address of its own to what
// loads a fragment. For the same reason tokens collect their rows by products with diagonal matrices.
#pragma once

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/gradient.cuh"
#include "guided_aggregate/matrix.cuh"

namespace any2point {
namespace guided {

constexpr int kTokens = 128;
constexpr int kFactors = 16;                  // M + 1 at most
constexpr int kPlaces = kTokens + kRowTile;   // of a view, and what a fragment may read beyond them
constexpr int kNoRow = 255;                   // of places beyond the last
constexpr int kPairs = kSlice / 16;           // of tiles of 8 channels
constexpr int kTileWarps = kThreads / kWarp;  // of a block
static_assert(kTokens == 16 * kTileWarps, "a warp for 16 tokens");

template <typename T>
__device__ inline Lane<2> unpack_two(uint32_t both) {
  T low, high;
  low.bits = static_cast<uint16_t>(both);
  high.bits = static_cast<uint16_t>(both >> 16);
  return {{widen(low), widen(high)}};
}
// Two numbers in the features' type, of binary16 the largest ones for those beyond it.
template <typename T>
__device__ inline uint32_t bounded_two(float low, float high) {
  if constexpr (std::is_same_v<T, Half>) return pack_two<T>(bounded(low), bounded(high));
  return pack_two<T>(low, high);
}

// As keep() does.
__device__ inline uint32_t bounded_halves(const Lane<2>& two) {
#if __CUDA_ARCH__ >= 800
  uint32_t both = pack_two<Half>(two.at[0], two.at[1]);
  asm("max.NaN.f16x2 %0, %0, %1; min.NaN.f16x2 %0, %0, %2;"
      : "+r"(both)
      : "r"(0xfbfffbffu), "r"(0x7bff7bffu));
  return both;
#else
  return pack_two<Half>(bounded(two.at[0]), bounded(two.at[1]));
#endif
}
// Two numbers of 16 bits that add up to each of these.
template <typename T>
__device__ inline void split_two(float low, float high, uint32_t* whole, uint32_t* rest) {
  *whole = bounded_two<T>(low, high);
  const Lane<2> two = unpack_two<T>(*whole);
  *rest = pack_two<T>(low - two.at[0], high - two.at[1]);
}

// Where rows of 64 channels have the 8 from 8 * `eight` on: those of 8 rows in a row lie in different banks.
// Those of 16 more follow by exclusive or with as many.
__device__ inline int at_row(int row, int eight) { return row * kSlice + ((eight ^ (row & 7)) << 3); }

// use(i, load(i)) for i below count, by all threads of a block; kAtOnce of them are loaded before any is
// used.
template <int kAtOnce, typename Load, typename Use>
__device__ __forceinline__ void in_batches(int count, const Load& load, const Use& use) {
  for (int first = threadIdx.x; first < count; first += kAtOnce * blockDim.x) {
    decltype(load(0)) value[kAtOnce];
#pragma unroll
    for (int a = 0; a < kAtOnce; a++) {
      if (first + a * int(blockDim.x) < count) value[a] = load(first + a * blockDim.x);
    }
#pragma unroll
    for (int a = 0; a < kAtOnce; a++) {
      if (first + a * int(blockDim.x) < count) use(first + a * blockDim.x, value[a]);
    }
  }
}

// A row's number in binary16, twice.
__device__ inline uint32_t two_rows(int row) { return pack_two<Half>(float(row), float(row)); }

// A view of a cloud.
struct alignas(4) Places {
  uint16_t row[kPlaces];   // of a place, in binary16, which is compared by twos
  uint8_t token[kPlaces];  // likewise, 0 beyond the last
  uint8_t begin[kPlaces];  // first place of a row
};

// own [V, kTokens]: rows of tokens, if given.
__device__ inline void load_places(const Guided& args, Places* places, uint8_t* own, int32_t* held) {
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  for (int i = threadIdx.x; i < views; i += blockDim.x) held[i] = args.count[i * args.clouds + blockIdx.x];
  struct Place {
    int token, row, begin;
  };
  in_batches<4>(
      views * kPlaces,
      [&](int i) {
        const int view = i / kPlaces, place = i % kPlaces;
        const int64_t layer = view * rows + base;
        Place of{0, kNoRow, static_cast<int>(args.start[layer + view + min(place, tokens)] - base)};
        if (place < tokens) {
          const int32_t token = args.order[layer + place];
          of.token = static_cast<int>(token - base);
          of.row = static_cast<int>(args.segment[view * rows + token] - base);
        }
        return of;
      },
      [&](int i, const Place& of) {
        const int view = i / kPlaces, place = i % kPlaces;
        places[view].row[place] = static_cast<uint16_t>(two_rows(of.row));
        places[view].token[place] = static_cast<uint8_t>(of.token);
        places[view].begin[place] = static_cast<uint8_t>(of.begin);
        if (own && place < tokens) own[view * kTokens + of.token] = static_cast<uint8_t>(of.row);
        if (own && place >= tokens && place < kTokens) own[view * kTokens + place] = 0;
      });
}

// GELU and its slope of two numbers.
struct GeluTwo {
  Lane<2> value, slope;
  uint32_t kept;  // values in binary16
};
template <typename T>
__device__ inline GeluTwo gelu_two(float low, float high) {
  GeluTwo both;
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BFloat16>) {
    // As gelu_for does, in binary16: its 11 bits are those of the tanh.
    const auto times = [](uint32_t a, uint32_t b) {
      uint32_t out;
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
      return out;
    };
    const auto times_and = [](uint32_t a, uint32_t b, uint32_t c) {
      uint32_t out;
      asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
      return out;
    };
    const uint32_t y = pack_two<Half>(low, high);
    uint32_t square, tail, bell;
    asm("min.f16x2 %0, %1, %2;" : "=r"(square) : "r"(times(y, y)), "r"(0x52405240u));
    const uint32_t factor = times_and(square, times_and(square, 0x8dc28dc2u, 0x28bd28bdu), 0x3a613a61u);
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(tail) : "r"(times(y, factor)));
    asm("ex2.approx.f16x2 %0, %1;" : "=r"(bell) : "r"(times(square, 0xb9c5b9c5u)));
    const uint32_t half = times(y, 0x38003800u);
    both.kept = times_and(half, tail, half);
    both.value = unpack_two<Half>(both.kept);
    both.slope =
        unpack_two<Half>(times_and(times(y, 0x36623662u), bell, times_and(tail, 0x38003800u, 0x38003800u)));
    return both;
  }
#endif
  const float y[2] = {low, high};
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const Gelu one = gelu_for<T>(y[n]);
    both.value.at[n] = one.value;
    both.slope.at[n] = one.slope;
  }
  both.kept = bounded_two<Half>(both.value.at[0], both.value.at[1]);
  return both;
}

// What the passes behind the pull need of a cloud, in this order in memory as well as in shared memory.
// Factors of s and of g_v in ds are binary16 and multiplied by a power of two each.
struct Tables {
  int planes;  // 16 bits [V, 3, kPlaces]: factors of s, of G, what rounding left of these
  int pairs;   // binary16 [V, kTokens]: factors of g_v in ds
  int gammas;  // binary16 [kTokens]: of s in ds
  int bents;   // float [V, kTokens]: factors of g in dg, by row
  int scales;  // float [2]: what takes the factors of s back; those of s in ds to those of g_v
  int places;  // Places [V]
  int own;     // 8 bits [V, kTokens]: rows of tokens
  int held;    // int [V]
  int tiles;   // int [V + 1]: tiles of the views before one
  int bytes = 0;

  __host__ __device__ explicit Tables(int64_t all_views) {
    const int views = static_cast<int>(all_views);
    planes = take(6 * views * kPlaces);
    pairs = take(2 * views * kTokens);
    gammas = take(2 * kTokens);
    bents = take(4 * views * kTokens);
    scales = take(8);
    places = take(static_cast<int>(sizeof(Places)) * views);
    own = take(views * kTokens);
    held = take(4 * views);
    tiles = take(4 * (views + 1));
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};
// Those from `from` on, of this block's cloud.
__device__ inline void copy_tables(char* to, const GradientWork& work, const Tables& tables, int from) {
  const char* const all = reinterpret_cast<const char*>(work.tables) + int64_t(blockIdx.x) * tables.bytes;
  for (int i = from + 16 * threadIdx.x; i < tables.bytes; i += 16 * kThreads) {
    copy_async<16>(to + i - from, all + i, true);
  }
}

__device__ inline int tiles_of(int held) { return (held + kRowTile - 1) / kRowTile; }
// Views [first, last) whose tiles fit; before [V + 1]: tiles of the views before one.
__device__ inline int last_of_tiles(const int32_t* before, int first, int views, int most) {
  int last = first;
  while (last < views && before[last + 1] - before[first] <= most) last++;
  return last;
}

// A tile's words, ahead of all products that follow.
__device__ __forceinline__ uint4 fetch_words(const uint4* from) {
  uint4 words;
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(from)));
#else
  words = *from;
#endif
  return words;
}

// Of two places all bits of 16 that have this row; `row`: two_rows of it.
__device__ inline uint32_t mask_of(uint32_t two, uint32_t row) {
#ifdef __CUDA_ARCH__
  uint32_t mask;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(two), "r"(row));
  return mask;
#else
  return (((two ^ row) & 0xffff) == 0 ? 0xffffu : 0u) | ((two ^ row) >> 16 == 0 ? 0xffff0000u : 0u);
#endif
}
__device__ inline void masks_of(uint32_t (&mask)[4], const Places& places, int place,
                                const uint32_t (&row)[2]) {
  const uint32_t* const two = reinterpret_cast<const uint32_t*>(places.row + place);
  mask[0] = mask_of(two[0], row[0]);
  mask[1] = mask_of(two[0], row[1]);
  mask[2] = mask_of(two[4], row[0]);
  mask[3] = mask_of(two[4], row[1]);
}

// sum [16, 16 kCount] += a [16, 16] rows [16, 16 kCount]; `at`: of this lane's row, lane % 16, and half,
// lane / 16.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_rows(float (&sum)[2 * kCount][4], const uint32_t (&a)[4],
                                              unsigned at) {
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    uint32_t b[4];
    load_transposed(b, at ^ 32 * j);
    multiply<T>(sum[2 * j], a, b[0], b[1]);
    multiply<T>(sum[2 * j + 1], a, b[2], b[3]);
  }
}
// The same with high + low for a; products of one sum are not next to each other.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_rows(float (&sum)[2 * kCount][4], const uint32_t (&high)[4],
                                              const uint32_t (&low)[4], unsigned at) {
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    uint32_t b[2][4];
    load_transposed(b[0], at ^ 32 * j);
    load_transposed(b[1], at ^ 32 * (j + 1));
#pragma unroll
    for (int n = 0; n < 4; n++)
      multiply<T>(sum[2 * j + n], low, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < 4; n++)
      multiply<T>(sum[2 * j + n], high, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

// Where a tile of this block's cloud and slice is among rows that wait, in uint4 for this lane.
__device__ inline int64_t tile_at(const Guided& args, int view, int tile) {
  const int64_t tiles = (args.tokens + kRowTile - 1) / kRowTile;
  const int64_t number = (view * args.clouds + blockIdx.x) * tiles + tile;
  return (number * gridDim.y + blockIdx.y) * (kPairs * kWarp) + threadIdx.x % kWarp;
}

}  // namespace guided
}  // namespace any2point
