// The tokens that stay on the device between two steps of generation.
//
// Math     take: ids[r] = given[r] if that is a token (0 and above), else latest[-1 - given[r]]: the token that was sampled
//          last in that slot
//          keep: latest[slot of row r] = token[r], for the rows that are no padding
// Shapes   ids, given, token [rows] int; info [rows, 3] int, of which the first (a sequence number; negative: padding) and
//          the third (the slot) count, as in sample.cu; latest [slots] int
// Plan     a thread a row. So a step needs no token of the step before it from the host.
// Numerics moves are exact. Rows that are no padding have slots of their own.
// Cost     A launch each: 2 us, *predicted*.
#include "prim/vec.cuh"

// ids[r] = given[r], or what was sampled last in slot -1 - given[r]
KERNEL_FLAT(take_tokens)(int* ids, const int* given, const int* latest, int rows) {
  const long long row = FLAT_INDEX;
  if (row >= rows) return;
  const int token = given[row];
  ids[row] = token < 0 ? latest[-1 - token] : token;
}

// latest[slot] = token of each row that is no padding
KERNEL_FLAT(keep_tokens)(INOUT(int) latest, const int* token, const int* info, int rows, int ints) {
  const long long row = FLAT_INDEX;
  if (row >= rows || info[row * ints] < 0) return;
  latest[info[row * ints + 2]] = token[row];
}
