// Sums over rows, in a fixed order: bias gradients, and the second stage of every two-stage reduction.
//
// Math     out[c] = sum_r x[r, c]
// Shapes   x [rows, cols] real (row stride ld);  partial [chunks, cols] float, a chunk is 64 rows;  out [cols] float
// Plan     column_sums: one warp per 32 V columns of one chunk. sum_partials: one thread per column of a group of chunks; more
//          than 64 chunks are first summed in groups of 32 (RowSums in ops/mod.rs). Few threads walk down long columns, so both
//          kernels keep many loads in flight.
// Numerics Float sums from the first row to the last, then from the first chunk of a group to the last, then from the first group
//          to the last: no atomics, always the same bits.
// Cost     One read of x. H100, 2026-11-27: column_sums of 16,384 x 1,152 bf16 21.9 us with 8 rows in flight (60% of copy speed;
//          one at a time 44.1 us, 16 in flight 21.6). Two stages of sum_partials in a graph: 4.1 us for 256 x 1,152, 6.1 us for
//          2,048 x 896; one stage with one load at a time took 17.4 us for 256 x 1,152.
#include "prim/warp.cuh"

// Loads that a lane keeps in flight. (On a CPU, with one lane per warp, this would only add copies.)
constexpr int AHEAD = 8, CHUNKS_AHEAD = 16;

KERNEL_WARP(column_sums, BLOCKS=0:4)(float* partial, const real* x, int rows, int cols, int ld) {
  const int steps = (cols + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int chunk = (int)(warp / steps), i = (int)(warp % steps) * WARP_STEP + WCOL;
  if (chunk * SUM_ROWS >= rows) return;
  const int end = chunk * SUM_ROWS + SUM_ROWS < rows ? chunk * SUM_ROWS + SUM_ROWS : rows;
  WarpPack acc = {};
  int row = chunk * SUM_ROWS;
  if (LANES > 1 && whole_packs(x, ld) && cols % V == 0) {
    for (; row + AHEAD <= end; row += AHEAD) {
      Packed<WV, real> p[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) p[k] = fetch<WV>(x + (long long)(row + k) * ld + i, cols - i);
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        const WarpPack v = values(p[k]);
#pragma unroll
        for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
      }
    }
  }
  for (; row < end; ++row) {
    WarpPack v = load_row(x + (long long)row * ld, i, cols);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  store(partial + (long long)chunk * cols + i, acc, cols - i);
}

// out[g, c] (+)= sum of partial[chunk, c] over the chunks of group g = blockIdx.y; a group has `group` chunks.
KERNEL_FLAT(sum_partials, BLOCKS=0:4)(float* out, const float* partial, int chunks, int cols, int group, int accumulate) {
  const long long c = FLAT_INDEX;
  const int first = blockIdx.y * group, end = first + group < chunks ? first + group : chunks;
  if (c >= cols || first >= end) return;
  float s = 0.f;
  for (int i = first; i < end; i += CHUNKS_AHEAD) {
    float v[CHUNKS_AHEAD];
#pragma unroll
    for (int k = 0; k < CHUNKS_AHEAD; ++k) v[k] = i + k < end ? partial[(long long)(i + k) * cols + c] : 0.f;
#pragma unroll
    for (int k = 0; k < CHUNKS_AHEAD; ++k) s += v[k];
  }
  float* to = out + (long long)blockIdx.y * cols + c;
  *to = accumulate ? *to + s : s;
}
