// group on CUDA: a copy, bound by the bytes written. A warp has 32 entries, whose rows lie one behind the
// other in the output: it reads their indices in one load and writes 16 bytes a lane, 512 in a row, four
// times in flight. Loads are as wide as rows and pointers allow, stores are not read again (.cs), so that the
// features stay in L2.
//
// H200, 32 x 1,024 rows to 512 x 81, us as a graph; the floor is the bytes at the copy bandwidth of 4.2 TB/s:
//                     float32, C = 96    64   192    97     bfloat16, C = 96
//   forward                       144   100   278   202                   75
//   backward                      148   108   267   203                   97
//   floor                         127    85   251   128                   65
// torch.gather takes 376 forward and 396 backward, by atomics. Forward: reading rows from L2 and writing them
// through it takes 83 % of the peak of L2, DRAM 72 %; with all indices equal, so that rows come from L1, it
// is 127. Backward, by inverse_list: 131 to add up (L2 90 %, DRAM 85 % of their peaks, 3.96 TB/s), 15 for the
// list, 2 between them. What limits is L2: with up to 40 MB of the gradient fetched into it while the list is
// built the sum of both is 0.6 less, with blocks that are made ready meanwhile 0.5 more, with loads that are
// used once (.cs), eight in flight, the adding up takes 148. Next: rows read by bulk copies to shared memory.
#include "common/grid.cuh"
#include "group/kernel.h"

namespace any2point {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kEntries = kWarp;  // of a warp

// The V that stands at `column` of a row full of the 8-byte pattern.
template <typename V>
__device__ V filler(uint64_t pattern, int64_t column) {
  if constexpr (sizeof(V) == 16) {
    return {uint32_t(pattern), uint32_t(pattern >> 32), uint32_t(pattern), uint32_t(pattern >> 32)};
  } else if constexpr (sizeof(V) == 8) {
    return {uint32_t(pattern), uint32_t(pattern >> 32)};
  } else {
    return V(pattern >> (8 * sizeof(V) * (column % (8 / sizeof(V)))));
  }
}

// V: what is loaded at once. Int: for all rows of the features, and for the bytes that a warp writes.
template <typename V, typename Int>
__global__ void __launch_bounds__(kThreads) group_kernel(Group args, int64_t total, uint64_t nan) {
  constexpr int kParts = 16 / sizeof(V), kInFlight = kParts >= 4 ? 1 : 4 / kParts;
  constexpr Int kNone = -1, kOutside = -2;
  const V* __restrict__ features = static_cast<const V*>(args.features);
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kEntries;
  if (first >= total) return;

  Int source = kNone;
  if (first + lane < total) {
    const int64_t entry = first + lane, row = args.index[entry];
    const int64_t cloud =
        ((entry | args.entries) >> 32) == 0 ? uint32_t(entry) / uint32_t(args.entries) : entry / args.entries;
    source = row >= 0 && row < args.rows ? Int(cloud * args.rows + row) : row == -1 ? kNone : kOutside;
  }

  // Chunks of 16 bytes: this lane has number `lane`, lane + 32, ... of those of the warp. The next one begins
  // at `column` of the warp's row `at`.
  const Int columns = Int(args.row_bytes / sizeof(V));
  const Int units = Int(min(kEntries, total - first)) * columns, chunks = (units + kParts - 1) / kParts;
  Int at = lane * kParts / columns, column = lane * kParts - at * columns;
  const Int rows_on = kWarp * kParts / columns, columns_on = kWarp * kParts - rows_on * columns;
  V* out = static_cast<V*>(args.out) + first * columns;
  for (Int chunk = lane; chunk - lane < chunks; chunk += kWarp * kInFlight) {
    Pack<V, kParts> moved[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      Int r = at, c = column;
#pragma unroll
      for (int p = 0; p < kParts; p++) {
        const Int row = __shfl_sync(kAll, source, int(r) % kWarp);
        V value{};
        if ((chunk + u * kWarp) * kParts + p < units) {
          if (row >= 0) value = __ldg(features + int64_t(row) * columns + c);
          if (row == kOutside) value = filler<V>(nan, c);
        }
        moved[u].at[p] = value;
        if (++c == columns) c = 0, r++;
      }
      at += rows_on;
      column += columns_on;
      if (column >= columns) column -= columns, at++;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      const Int next = (chunk + u * kWarp) * kParts;
      if (next + kParts <= units) {
        __stcs(reinterpret_cast<uint4*>(out + next), *reinterpret_cast<const uint4*>(&moved[u]));
      } else {
#pragma unroll
        for (int p = 0; p < kParts; p++) {
          if (next + p < units) out[next + p] = moved[u].at[p];
        }
      }
    }
  }
}

template <typename V>
int launch(const Group& args, int64_t clouds, uint64_t nan, cudaStream_t stream) {
  const int64_t total = clouds * args.entries, each = kWarps * kEntries;
  const auto blocks = static_cast<unsigned>((total + each - 1) / each);
  if ((clouds * args.rows | 2 * kEntries * args.row_bytes) >> 31 == 0) {
    group_kernel<V, int32_t><<<blocks, kThreads, 0, stream>>>(args, total, nan);
  } else {
    group_kernel<V, int64_t><<<blocks, kThreads, 0, stream>>>(args, total, nan);
  }
  return cudaGetLastError();
}

}  // namespace

int group_cuda(const Group& args, int64_t clouds, uint64_t nan, void* stream_) {
  if (clouds * args.entries * args.row_bytes == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const auto fits = [&](int64_t bytes) {
    return args.row_bytes % bytes == 0 && aligned(args.features, bytes);
  };
  if (fits(16)) return launch<uint4>(args, clouds, nan, stream);
  if (fits(8)) return launch<uint2>(args, clouds, nan, stream);
  if (fits(4)) return launch<unsigned int>(args, clouds, nan, stream);
  if (fits(2)) return launch<unsigned short>(args, clouds, nan, stream);
  return launch<unsigned char>(args, clouds, nan, stream);
}

}  // namespace any2point
