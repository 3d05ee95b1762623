// Root mean square norm, plain or fused with the residual addition that precedes it in every block.
//
// Math     s = x (+ r);  rstd = 1/sqrt(mean(s^2) + eps);  y = (w + plus) * (s * rstd), plus = 0, or 1 for Gemma
//          Backward, with h = s * rstd, e = dy * (w + plus):  ds = rstd * (e - h * mean(e * h)) + dsum;  dw = sum_rows dy * h
//          (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)
// Shapes   x, r, s, y, dy, ds [rows, d] real;  w [d] real;  rstd [rows] float;  dw [d] float
// Plan     One warp per row. With D > 0 the row stays in registers, D packs per lane, and all its loads are issued before the
//          first is used; the backward walks through `per` rows and accumulates dw on the way, so that dy and s are read once for
//          both results. D=0, for CPUs and for other row lengths, reads a row twice (the second read hits the cache) and leaves
//          dw to rmsnorm_dw, where a warp owns 32 V columns of `per` rows. The partial sums are the same either way; sum_partials
//          (reduce.cu) adds them in order. No atomics.
// Numerics Sums in float. s is rounded to real when stored; h is rounded to real before the product with w unless `once` is set
//          (each as transformers does for its family); y is rounded when stored.
// Cost     Forward 2 d (4 d with residual) x sizeof(real) bytes a row. Backward with dw 3 d (4 d with dsum), plus 8 d / per bytes
//          of partial sums. H100, 2026-11-27, bf16, with residual and dsum, as shares of copy speed (2.88 TB/s): forward 16,384 x
//          896 92% (43.9 us; with D=0 81%), 8,192 x 1,536 90%; a launch of 256 rows in a graph 2.55 us (D=0: 8.1 us by ncu).
//          Backward 88% (46.4 us; D=0 68%), with dw and per = 8 82% (49.9 us) where D=0 and rmsnorm_dw took 60.0 + 77.5 us; 8,192
//          x 1,536 75%; 4,096 rows of 1,024, 34 MB, mostly start and end of the kernel: 60% (19.2 us).
#include "common/norm.cuh"
#include "prim/math.cuh"

// A row of whole packs, D per lane (D=0: any row, read in a loop). All loads of a row are issued at once, so few warps keep the
// memory busy.
template <int D>
struct RowPacks {
  Packed<WV, real> p[D];
  DEVICE_MEMBER RowPacks(const real* row, int d) {
#pragma unroll
    for (int k = 0; k < D; ++k) p[k] = fetch<WV>(row + k * WARP_STEP + WCOL, d - k * WARP_STEP - WCOL);
  }
  DEVICE_MEMBER WarpPack operator[](int k) const { return values(p[k]); }
};

// y and rstd of each row of x. With `res` the norm is that of x + res, which is written to `sum`.
KERNEL_WARP(rmsnorm_fwd, D=0,1,2,3,4,6,8, HOT)(real* y, MAYBE(real) sum, float* rstd, const real* x, MAYBE(const real) res,
                                               const real* w, int rows, int d, float eps, float plus, int once) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const long long at = row * d;
  WarpPack square = {};
  if constexpr (D > 0) {
    RowPacks<D> s(x + at, d), r(res ? res + at : x + at, d), g(w, d);
#pragma unroll
    for (int k = 0; k < D; ++k) {
      WarpPack v = s[k];
      if (res) {
        const WarpPack more = r[k];
#pragma unroll
        for (int j = 0; j < WV; ++j) v.v[j] = round_real(v.v[j] + more.v[j]);
        s.p[k] = packed<real>(v);
        put(sum + at + k * WARP_STEP + WCOL, s.p[k], d - k * WARP_STEP - WCOL);
      }
#pragma unroll
      for (int j = 0; j < WV; ++j) square.v[j] = fmaf(v.v[j], v.v[j], square.v[j]);
    }
    const float scale = rstd_of(pack_sum(square), d, eps);
    if (LANE == 0) rstd[row] = scale;
#pragma unroll
    for (int k = 0; k < D; ++k) {
      WarpPack v = s[k];
      const WarpPack f = g[k];
#pragma unroll
      for (int j = 0; j < WV; ++j) v.v[j] = weighted(v.v[j] * scale, f.v[j], plus, once);
      put(y + at + k * WARP_STEP + WCOL, packed<real>(v), d - k * WARP_STEP - WCOL);
    }
  } else {
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
    const float scale = rstd_of(pack_sum(square), d, eps);
    if (LANE == 0) rstd[row] = scale;
    const real* s_row = (res ? sum : x) + at;
    for (int i = WCOL; i < d; i += WARP_STEP) {
      WarpPack s = load_row(s_row, i, d), g = load_row(w, i, d);
#pragma unroll
      for (int j = 0; j < WV; ++j) s.v[j] = weighted(s.v[j] * scale, g.v[j], plus, once);
      store(y + at + i, s, d - i);
    }
  }
}

// ds of each row. `dsum` is the gradient that reaches s through the residual stream, or null. A warp takes `per` rows; with
// `partial` (not with D=0) it also writes their sum of dy * h there.
KERNEL_WARP(rmsnorm_bwd, D=0,1,2,3,4,6, HOT)(real* ds, MAYBE(float) partial, const real* dy, MAYBE(const real) dsum,
                                               const real* s, const real* w, const float* rstd, int rows, int d, int per,
                                               int accumulate, float plus) {
  const long long warp = WARP_INDEX;
  const long long first = warp * per, end = first + per < rows ? first + per : rows;
  if (first >= rows) return;
  if constexpr (D > 0) {
    WarpPack dw[D] = {};
    for (long long row = first; row < end; ++row) {
      const long long at = row * d;
      const RowPacks<D> e(dy + at, d), h(s + at, d), up(dsum ? dsum + at : s + at, d), g(w, d);
      const float scale = rstd[row];
      WarpPack dot = {};
#pragma unroll
      for (int k = 0; k < D; ++k) {
        const WarpPack a = e[k], b = h[k], f = g[k];
#pragma unroll
        for (int j = 0; j < WV; ++j) {
          const float norm = b.v[j] * scale;
          dot.v[j] = fmaf(a.v[j] * (f.v[j] + plus), norm, dot.v[j]);
          if (partial) dw[k].v[j] = fmaf(a.v[j], norm, dw[k].v[j]);
        }
      }
      const float mean = pack_sum(dot) / (float)d;
#pragma unroll
      for (int k = 0; k < D; ++k) {
        WarpPack a = e[k], more = {};
        const WarpPack b = h[k], f = g[k];
        if (dsum) more = up[k];
#pragma unroll
        for (int j = 0; j < WV; ++j) a.v[j] = scale * (a.v[j] * (f.v[j] + plus) - b.v[j] * scale * mean) + more.v[j];
        const int i = k * WARP_STEP + WCOL;
        if (accumulate) {
          const WarpPack old = values(fetch<WV>((const real*)ds + at + i, d - i));
#pragma unroll
          for (int j = 0; j < WV; ++j) a.v[j] += old.v[j];
        }
        put(ds + at + i, packed<real>(a), d - i);
      }
    }
    if (partial) {
#pragma unroll
      for (int k = 0; k < D; ++k) {
        const int i = k * WARP_STEP + WCOL;
        put(partial + warp * d + i, packed<float>(dw[k]), d - i);
      }
    }
  } else {
    for (long long row = first; row < end; ++row) {
      const long long at = row * d;
      const float scale = rstd[row];
      WarpPack dot = {};
      for (int i = WCOL; i < d; i += WARP_STEP) {
        WarpPack e = load_row(dy + at, i, d), g = load_row(w, i, d), h = load_row(s + at, i, d);
#pragma unroll
        for (int j = 0; j < WV; ++j) dot.v[j] = fmaf(e.v[j] * (g.v[j] + plus), h.v[j] * scale, dot.v[j]);
      }
      const float mean = pack_sum(dot) / (float)d;
      for (int i = WCOL; i < d; i += WARP_STEP) {
        WarpPack e = load_row(dy + at, i, d), g = load_row(w, i, d), h = load_row(s + at, i, d);
        WarpPack up = {};
        if (dsum) up = load_row(dsum + at, i, d);
#pragma unroll
        for (int j = 0; j < WV; ++j) e.v[j] = scale * (e.v[j] * (g.v[j] + plus) - h.v[j] * scale * mean) + up.v[j];
        store(ds + at + i, e, d - i, accumulate);
      }
    }
  }
}

// The same partial sums where rmsnorm_bwd does not compute them. One warp per (chunk of `per` rows, 32 V columns).
KERNEL_WARP(rmsnorm_dw)(float* partial, const real* dy, const real* s, const float* rstd, int rows, int d, int per) {
  const int steps = (d + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX, chunk = warp / steps;
  const int i = (int)(warp % steps) * WARP_STEP + WCOL;
  const long long first = chunk * per, end = first + per < rows ? first + per : rows;
  if (first >= rows) return;
  WarpPack acc = {};
  for (long long row = first; row < end; ++row) {
    const float scale = rstd[row];
    WarpPack e = load_row(dy + row * d, i, d), h = load_row(s + row * d, i, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(e.v[j], h.v[j] * scale, acc.v[j]);
  }
  store(partial + chunk * d + i, acc, d - i);
}
