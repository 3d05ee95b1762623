// What products of few rows share.
#pragma once
#include "prim/async.cuh"

// Asks L2 for the first `ahead` bytes (a multiple of 128) of the block's rows of W, before the wait for the previous kernel: `half`
// rows from `low` on and as many from `high` on, of n rows. Only blocks below `wave` of the grid's first row, which start while that
// kernel ends. Line by line: a bulk prefetch would stand in front of the bulk copies of the tiles.
DEVICE void prefetch_rows(const real* w, long long ld, int low, int high, int half, int n, int ahead, int wave) {
  const int lines = blockIdx.y == 0 && (int)blockIdx.x < wave ? ahead / 128 : 0;
  for (int i = threadIdx.x; i < 2 * half * lines; i += blockDim.x) {
    const int r = i / lines, row = r < half ? low + r : high + r - half;
    if (row < n) prefetch_l2(w + row * ld + i % lines * (128 / (int)sizeof(real)));
  }
}
