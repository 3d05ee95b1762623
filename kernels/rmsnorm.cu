// Root mean square norm, plain or with the residual addition that stands before it in every block.
//
// Math     s = x (+ r);  rstd = 1/sqrt(mean(s^2) + eps);  y = w * (s * rstd)
//          Backward, with h = s * rstd, e = dy * w:  ds = rstd * (e - h * mean(e * h)) + dsum;  dw = sum_rows dy * h
//          (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)
// Shapes   x, r, s, y, dy, ds [rows, d] real;  w [d] real;  rstd [rows] float;  dw [d] float
// Plan     A warp owns a row and reads it twice (the second read hits the cache). dw: a warp owns 32 V columns of 64
//          rows and writes a partial sum; sum_partials (reduce.cu) adds the partials in order. No atomics.
// Numerics Sums in float. s is rounded to real when stored, h is rounded to real before the product with w (as
//          transformers does), y when stored.
// Cost     forward 4 d (8 d with residual) x sizeof(real) bytes a row, backward 4 d more for dw. GPU: not measured yet.
#include "prim/math.cuh"
#include "prim/warp.cuh"

// y, rstd of each row of x; with `res` the norm is of x + res, which is written to `sum`.
KERNEL_WARP(rmsnorm_fwd, HOT)(real* y, MAYBE(real) sum, float* rstd, const real* x, MAYBE(const real) res, const real* w,
                              int rows, int d, float eps) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const long long at = row * d;
  WarpPack square = {};
  for (int i = WCOL; i < d; i += WARP_STEP) {
    WarpPack s = load_row(x + at, i, d);
    if (res) {
      WarpPack r = load_row(res + at, i, d);
#pragma unroll
      for (int j = 0; j < WV; ++j) s.v[j] = round_real(s.v[j] + r.v[j]);
      store(sum + at + i, s, d - i);
    }
#pragma unroll
    for (int j = 0; j < WV; ++j) square.v[j] = fmaf(s.v[j], s.v[j], square.v[j]);
  }
  const float scale = 1.f / sqrtf(pack_sum(square) / (float)d + eps);
  if (LANE == 0) rstd[row] = scale;
  const real* s_row = (res ? sum : x) + at;
  for (int i = WCOL; i < d; i += WARP_STEP) {
    WarpPack s = load_row(s_row, i, d), g = load_row(w, i, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) s.v[j] = g.v[j] * round_real(s.v[j] * scale);
    store(y + at + i, s, d - i);
  }
}

// ds of each row; `dsum` is the gradient that reaches s from elsewhere (the residual stream), or null.
KERNEL_WARP(rmsnorm_bwd, HOT)(real* ds, const real* dy, MAYBE(const real) dsum, const real* s, const real* w,
                              const float* rstd, int rows, int d, int accumulate) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const long long at = row * d;
  const float scale = rstd[row];
  WarpPack dot = {};
  for (int i = WCOL; i < d; i += WARP_STEP) {
    WarpPack e = load_row(dy + at, i, d), g = load_row(w, i, d), h = load_row(s + at, i, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) dot.v[j] = fmaf(e.v[j] * g.v[j], h.v[j] * scale, dot.v[j]);
  }
  const float mean = pack_sum(dot) / (float)d;
  for (int i = WCOL; i < d; i += WARP_STEP) {
    WarpPack e = load_row(dy + at, i, d), g = load_row(w, i, d), h = load_row(s + at, i, d);
    WarpPack up = {};
    if (dsum) up = load_row(dsum + at, i, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) e.v[j] = scale * (e.v[j] * g.v[j] - h.v[j] * scale * mean) + up.v[j];
    store(ds + at + i, e, d - i, accumulate);
  }
}

// partial[chunk, column] = sum of dy * h over the chunk's 64 rows. A warp a (chunk, 32 V columns).
KERNEL_WARP(rmsnorm_dw)(float* partial, const real* dy, const real* s, const float* rstd, int rows, int d) {
  const int steps = (d + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int chunk = (int)(warp / steps), i = (int)(warp % steps) * WARP_STEP + WCOL;
  if (chunk * SUM_ROWS >= rows) return;
  const int end = chunk * SUM_ROWS + SUM_ROWS < rows ? chunk * SUM_ROWS + SUM_ROWS : rows;
  WarpPack acc = {};
  for (int row = chunk * SUM_ROWS; row < end; ++row) {
    const float scale = rstd[row];
    WarpPack e = load_row(dy + (long long)row * d, i, d), h = load_row(s + (long long)row * d, i, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(e.v[j], h.v[j] * scale, acc.v[j]);
  }
  store(partial + (long long)chunk * d + i, acc, d - i);
}
