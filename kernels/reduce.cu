// Sums over rows, in a fixed order: bias gradients, and the second stage of every two-stage reduction.
//
// Math     out[c] = sum_r x[r, c]
// Shapes   x [rows, cols] real (row stride ld);  partial [chunks, cols] float, a chunk is 64 rows;  out [cols] float
// Plan     column_sums: a warp owns 32 V columns of one chunk. sum_partials: a thread owns a column.
// Numerics Float sums from the first row to the last, then from the first chunk to the last: no atomics, same bits always.
// Cost     one read of x. GPU: not measured yet.
#include "prim/warp.cuh"

KERNEL_WARP(column_sums)(float* partial, const real* x, int rows, int cols, int ld) {
  const int steps = (cols + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int chunk = (int)(warp / steps), i = (int)(warp % steps) * WARP_STEP + WCOL;
  if (chunk * SUM_ROWS >= rows) return;
  const int end = chunk * SUM_ROWS + SUM_ROWS < rows ? chunk * SUM_ROWS + SUM_ROWS : rows;
  WarpPack acc = {};
  for (int row = chunk * SUM_ROWS; row < end; ++row) {
    WarpPack v = load_row(x + (long long)row * ld, i, cols);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  store(partial + (long long)chunk * cols + i, acc, cols - i);
}

// out[c] (+)= sum over chunks of partial[chunk, c]
KERNEL_FLAT(sum_partials)(float* out, const float* partial, int chunks, int cols, int accumulate) {
  const long long c = FLAT_INDEX;
  if (c >= cols) return;
  float s = partial[c];
  for (int i = 1; i < chunks; ++i) s += partial[(long long)i * cols + c];
  out[c] = accumulate ? out[c] + s : s;
}
