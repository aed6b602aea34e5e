#include "group/kernel.h"

#include <string.h>

namespace any2point {
namespace {

// kBytes > 0: the row's size is a constant, and the copy a few moves instead of a call.
template <int kBytes>
int64_t copy_rows(const Group& args, int64_t begin, int64_t end) {
  const size_t bytes = kBytes > 0 ? kBytes : args.row_bytes;
  int64_t bad = -1, cloud = begin / args.entries, r = begin % args.entries;
  char* out = static_cast<char*>(args.out) + begin * bytes;
  for (int64_t i = begin; i < end; i++, out += bytes) {
    const int64_t row = args.index[i];
    if (row >= 0 && row < args.rows) {
      memcpy(out, static_cast<const char*>(args.features) + (cloud * args.rows + row) * bytes, bytes);
    } else {
      memset(out, 0, bytes);
      if (row != -1 && bad < 0) bad = i;
    }
    if (++r == args.entries) r = 0, cloud++;
  }
  return bad;
}

}  // namespace

int64_t group_cpu(const Group& args, int64_t begin, int64_t end) {
  switch (args.row_bytes) {
    case 4:
      return copy_rows<4>(args, begin, end);
    case 8:
      return copy_rows<8>(args, begin, end);
    case 12:  // xyz
      return copy_rows<12>(args, begin, end);
    case 16:
      return copy_rows<16>(args, begin, end);
    case 24:
      return copy_rows<24>(args, begin, end);
    default:
      return copy_rows<0>(args, begin, end);
  }
}

}  // namespace any2point
