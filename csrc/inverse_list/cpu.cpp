#include "inverse_list/kernel.h"

#include <algorithm>

#include "common/isa.h"

namespace any2point {

template <typename List>
int64_t inverse_list_cpu(const int64_t* index, int64_t entries, int64_t rows, int64_t base, List* start,
                         List* order) {
  int64_t bad = -1;
  std::fill(start, start + rows + 1, List(0));
  for (int64_t r = 0; r < entries; r++) {
    const int64_t row = index[r];
    if (row >= 0 && row < rows) {
      start[row]++;
    } else if (row != -1 && bad < 0) {
      bad = r;
    }
  }
  // Ends of the rows first; filling from the back then leaves each start at its row's beginning.
  List end = static_cast<List>(base);
  for (int64_t n = 0; n <= rows; n++) start[n] = end += start[n];
  for (int64_t r = entries - 1; r >= 0; r--) {
    const int64_t row = index[r];
    if (row >= 0 && row < rows) order[--start[row]] = static_cast<List>(base + r);
  }
  return bad;
}
template int64_t inverse_list_cpu(const int64_t*, int64_t, int64_t, int64_t, uint32_t*, uint32_t*);
template int64_t inverse_list_cpu(const int64_t*, int64_t, int64_t, int64_t, int64_t*, int64_t*);

A2P_DECLARE_ISA(void gather_reduce_rows(const GatherReduce& args, int64_t begin, int64_t end))

void gather_reduce_cpu(const GatherReduce& args, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(gather_reduce_rows, args, begin, end)
}

}  // namespace any2point
