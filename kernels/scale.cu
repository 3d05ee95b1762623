// Multiplication by one factor per column (IA3's learned vectors, DoRA's magnitudes, the scale of LoRA's narrow product) or by
// one factor for all values (the multipliers of embeddings and of branches in Granite and Gemma).
//
// Math     y[r, j] = c[j] x[r, j] (+ bias[j]);   c[j] = s[j] / norm[j] (no norm: s[j]; no s: 1)
//          dx = c dy;   dc[j] = sum_r dy[r, j] x[r, j];   ds = dc / norm (norm is a constant in the gradient)
//          (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022, section
//          3.3; Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3)
// Shapes   x, y, dy, dx [rows, cols] real;  c, norm, dc [cols] float;  s, bias [cols] real
// Plan     scale_columns: one thread per V values of a row. column_dots: one warp per 32 V columns of 64 rows; sum_partials of
//          reduce.cu adds the partials. The vectors: one thread per column.
// Numerics float, rounded once when stored. Sums over rows in a fixed order.
// Cost     2 rows cols sizeof(real) bytes each. *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "prim/warp.cuh"

KERNEL_FLAT(scale_columns)(real* y, const real* x, const float* c, MAYBE(const real) bias, int rows, int cols,
                           int accumulate) {
  const int packs = (cols + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)rows * packs) return;
  const long long row = item / packs;
  const int i = (int)(item % packs) * V, n = cols - i;
  FlatPack p = load<V>(x + row * cols + i, n), f = load<V>(c + i, n);
  if (bias) {
    FlatPack b = load<V>(bias + i, n);
#pragma unroll
    for (int j = 0; j < V; ++j) p.v[j] = fmaf(p.v[j], f.v[j], b.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) p.v[j] *= f.v[j];
  }
  store(y + row * cols + i, p, n, accumulate);
}

// y (+)= c x
KERNEL_FLAT(multiply)(real* y, const real* x, long long n, float c, int accumulate) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] *= c;
  store(y + i, p, n - i, accumulate);
}

KERNEL_WARP(column_dots)(float* partial, const real* dy, const real* x, int rows, int cols) {
  const int steps = (cols + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int chunk = (int)(warp / steps), i = (int)(warp % steps) * WARP_STEP + WCOL;
  if (chunk * SUM_ROWS >= rows) return;
  const int end = chunk * SUM_ROWS + SUM_ROWS < rows ? chunk * SUM_ROWS + SUM_ROWS : rows;
  WarpPack acc = {};
  for (int row = chunk * SUM_ROWS; row < end; ++row) {
    WarpPack d = load_row(dy + (long long)row * cols, i, cols), v = load_row(x + (long long)row * cols, i, cols);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(d.v[j], v.v[j], acc.v[j]);
  }
  store(partial + (long long)chunk * cols + i, acc, cols - i);
}

// c = s / norm; a missing s or norm counts as 1.
KERNEL_FLAT(column_factor)(float* c, MAYBE(const real) s, MAYBE(const float) norm, int cols) {
  const long long j = FLAT_INDEX;
  if (j < cols) c[j] = (s ? to_float(s[j]) : 1.f) / (norm ? norm[j] : 1.f);
}

// ds (+)= dc / norm
KERNEL_FLAT(column_factor_grad)(float* ds, const float* dc, MAYBE(const float) norm, int cols, int accumulate) {
  const long long j = FLAT_INDEX;
  if (j >= cols) return;
  const float d = norm ? dc[j] / norm[j] : dc[j];
  ds[j] = accumulate ? ds[j] + d : d;
}

// norm[j] = |w[j, :]|
KERNEL_WARP(row_norms)(float* norm, const float* w, int rows, int cols) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  WarpPack acc = {};
  for (int i = WCOL; i < cols; i += WARP_STEP) {
    WarpPack v = load_row(w + row * cols, i, cols);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(v.v[j], v.v[j], acc.v[j]);
  }
  const float s = pack_sum(acc);
  if (LANE == 0) norm[row] = sqrtf(s);
}
