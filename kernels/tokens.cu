// Sampled tokens that stay on the device between two steps of generation.
//
// Math     take: ids[r] = given[r] if that is a token (0 and above), else latest[-1 - given[r]]: the token last sampled in that
//          slot
//          keep: latest[slot of row r] = token[r], for all rows except padding
// Shapes   ids, given, token [rows] int;  info [rows, ints] int as in sample.cu, of which the first (sequence number; negative:
//          padding) and the third (slot) are read;  latest [slots] int
// Plan     One thread per row. A step thus needs no token of the previous step from the host.
// Numerics Copies are exact. Rows other than padding have distinct slots.
// Cost     One launch each: 2 us, *predicted*.
#include "prim/vec.cuh"

// ids[r] = given[r], or the last token of slot -1 - given[r].
KERNEL_FLAT(take_tokens)(int* ids, const int* given, const int* latest, int rows) {
  const long long row = FLAT_INDEX;
  if (row >= rows) return;
  const int token = given[row];
  ids[row] = token < 0 ? latest[-1 - token] : token;
}

// latest[slot] = token of each row except padding.
KERNEL_FLAT(keep_tokens)(INOUT(int) latest, const int* token, const int* info, int rows, int ints) {
  const long long row = FLAT_INDEX;
  if (row >= rows || info[row * ints] < 0) return;
  latest[info[row * ints + 2]] = token[row];
}
