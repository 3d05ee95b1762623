// The gated short convolution of LFM2: it mixes positions in layers without attention.
//
// Math     a row of bcx is b|c|x;  u = b x;  s[r, i] = bias[i] + sum_d w[i, T - 1 - d] u[r - d, i], d < T;  y = c s
//          r - d is the token d places before r in its own sequence; those before its first count as 0.
//          g = dy c;  dc = dy s;  du[p] = sum over (r, d) with r - d = p of w[T - 1 - d] g[r];  db = du x;  dx = du b
//          dw[i, T - 1 - d] = sum_r g[r, i] u[r - d, i];  dbias = sum_r g[r]
//          (Liquid AI, LFM2, 2025: a convolution with two gates; Lfm2ShortConv of transformers)
// Shapes   bcx, dbcx [rows, 3 h] real;  y, dy [rows, h] real;  w [h, T] real, dw float;  bias [h] real, dbias float
//          back [rows, T] int: row r - d, or -1 (d = 0: r itself);  starts [rows + 1], next [.., 2] int: the pairs (r, d) that
//          read row p, by d, then by r. A shared prompt's last rows are read by the first rows of every completion.
//          paged: cache [pages * PAGE, h] real holds the u of each token where attention has its k and v.
// Plan     a thread owns V channels of a row and reads the T rows under its filter. Backward of bcx: the same with the pairs of
//          its row; only bcx is saved. dw and dbias: a warp owns 32 V channels of 64 rows for one tap, sum_partials of
//          reduce.cu adds the partials. Paged: the rows' u go to the cache first, then a launch reads all of them from pages,
//          whether they came with this step or an earlier one.
// Numerics u and s are rounded to real, as transformers rounds them; s is one chain of fmaf from the oldest token to the
//          newest, y is rounded once. So training and both paged forms have the same bits. Gradients sum in float in the order
//          of the pairs, then of the rows: no atomics.
// Cost     forward 4 h sizeof(real) bytes a row (the T - 1 earlier rows of b and x hit the L2 cache), backward 7 h, dw 4 h.
//          *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "common/mask.cuh"
#include "prim/warp.cuh"

// b x of a row, as it is stored.
template <int N>
DEVICE Pack<N> gated(const real* bcx, long long row, int i, int h) {
  Pack<N> u = load<N>(bcx + row * 3 * h + i, h - i), x = load<N>(bcx + (row * 3 + 2) * h + i, h - i);
#pragma unroll
  for (int j = 0; j < N; ++j) u.v[j] = round_real(u.v[j] * x.v[j]);
  return u;
}

// sum += w[channel, T - 1 - d] u
DEVICE void add_tap(FlatPack& sum, const FlatPack& u, const real* w, int i, int n, int taps, int d) {
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (j < n) sum.v[j] = fmaf(to_float(w[(long long)(i + j) * taps + taps - 1 - d]), u.v[j], sum.v[j]);
}

DEVICE FlatPack first_sum(const real* bias, int i, int n) {
  FlatPack sum = {};
  if (bias) sum = load<V>(bias + i, n);
  return sum;
}

// s of a row of a packed batch.
DEVICE FlatPack convolved(const real* bcx, const real* w, const real* bias, const int* back, long long row, int i, int h,
                          int taps) {
  FlatPack sum = first_sum(bias, i, h - i);
  for (int d = taps - 1; d >= 0; --d) {
    const int from = back[row * taps + d];
    if (from >= 0) add_tap(sum, gated<V>(bcx, from, i, h), w, i, h - i, taps, d);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sum.v[j] = round_real(sum.v[j]);
  return sum;
}

KERNEL_FLAT(short_conv_fwd)(real* y, const real* bcx, const real* w, MAYBE(const real) bias, const int* back, int rows,
                            int h, int taps) {
  const int packs = (h + V - 1) / V;
  const long long item = FLAT_INDEX, row = item / packs;
  if (row >= rows) return;
  const int i = (int)(item % packs) * V, n = h - i;
  FlatPack s = convolved(bcx, w, bias, back, row, i, h, taps), c = load<V>(bcx + (row * 3 + 1) * h + i, n);
#pragma unroll
  for (int j = 0; j < V; ++j) s.v[j] *= c.v[j];
  store(y + row * h + i, s, n);
}

KERNEL_FLAT(short_conv_bwd)(real* dbcx, const real* dy, const real* bcx, const real* w, MAYBE(const real) bias,
                            const int* back, const int* starts, const int* next, int rows, int h, int taps,
                            int accumulate) {
  const int packs = (h + V - 1) / V;
  const long long item = FLAT_INDEX, row = item / packs;
  if (row >= rows) return;
  const int i = (int)(item % packs) * V, n = h - i;
  FlatPack du = {};
  for (int k = starts[row]; k < starts[row + 1]; ++k) {
    const long long reader = next[2 * k];
    FlatPack g = load<V>(dy + reader * h + i, n), c = load<V>(bcx + (reader * 3 + 1) * h + i, n);
#pragma unroll
    for (int j = 0; j < V; ++j) g.v[j] *= c.v[j];
    add_tap(du, g, w, i, n, taps, next[2 * k + 1]);
  }
  FlatPack s = convolved(bcx, w, bias, back, row, i, h, taps), d = load<V>(dy + row * h + i, n);
  FlatPack b = load<V>(bcx + row * 3 * h + i, n), x = load<V>(bcx + (row * 3 + 2) * h + i, n);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x.v[j] *= du.v[j];
    b.v[j] *= du.v[j];
    s.v[j] *= d.v[j];
  }
  store(dbcx + row * 3 * h + i, x, n, accumulate);
  store(dbcx + (row * 3 + 1) * h + i, s, n, accumulate);
  store(dbcx + (row * 3 + 2) * h + i, b, n, accumulate);
}

// partial[chunk, channel * T + tap] of dw, then, with `parts` T + 1, partial[chunk, h T + channel] of dbias
KERNEL_WARP(short_conv_dw)(float* partial, const real* dy, const real* bcx, const int* back, int rows, int h, int taps,
                           int parts) {
  const int steps = (h + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX;
  const int i = (int)(warp % steps) * WARP_STEP + WCOL, part = (int)(warp / steps % parts);
  const long long chunk = warp / steps / parts, first = chunk * SUM_ROWS;
  if (first >= rows) return;
  const long long end = first + SUM_ROWS < rows ? first + SUM_ROWS : rows;
  WarpPack acc = {};
  for (long long row = first; row < end; ++row) {
    const int from = part < taps ? back[row * taps + part] : 0;
    if (from < 0) continue;
    WarpPack g = load_row(dy + row * h, i, h), c = load_row(bcx + (row * 3 + 1) * h, i, h), u;
    if (part < taps) u = gated<WV>(bcx, from, i, h);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float each = g.v[j] * c.v[j];
      acc.v[j] = part < taps ? fmaf(each, u.v[j], acc.v[j]) : acc.v[j] + each;
    }
  }
  float* to = partial + chunk * ((long long)h * parts);
  if (part == taps) return store(to + (long long)h * taps + i, acc, h - i);
#pragma unroll
  for (int j = 0; j < WV; ++j)
    if (i + j < h) to[(long long)(i + j) * taps + taps - 1 - part] = acc.v[j];
}

// The u of row r to row slots[r] of the cache; -1: nowhere.
KERNEL_FLAT(short_conv_append)(INOUT(real) cache, const real* bcx, const int* slots, int rows, int h) {
  const int packs = (h + V - 1) / V;
  const long long item = FLAT_INDEX, row = item / packs;
  if (row >= rows || slots[row] < 0) return;
  const int i = (int)(item % packs) * V;
  store(cache + (long long)slots[row] * h + i, gated<V>(bcx, row, i, h), h - i);
}

// The forward of rows whose u (their own included) lie in the cache. A row of sequence -1 is padding and gives 0.
KERNEL_FLAT(short_conv_paged)(real* y, const real* bcx, const real* cache, const real* w, MAYBE(const real) bias,
                              const int* page_table, const int* row_sequence, const int* row_position, int rows, int h,
                              int taps, int max_pages) {
  const int packs = (h + V - 1) / V;
  const long long item = FLAT_INDEX, row = item / packs;
  if (row >= rows) return;
  const int i = (int)(item % packs) * V, n = h - i;
  FlatPack s = {};
  const int sequence = row_sequence[row];
  if (sequence >= 0) {
    s = first_sum(bias, i, n);
    const PagedKeys keys = {page_table + (long long)sequence * max_pages, h};
    const int position = row_position[row];
    for (int d = taps - 1; d >= 0; --d)
      if (d <= position) add_tap(s, load<V>(cache + (long long)keys.row(position - d) * h + i, n), w, i, n, taps, d);
    FlatPack c = load<V>(bcx + (row * 3 + 1) * h + i, n);
#pragma unroll
    for (int j = 0; j < V; ++j) s.v[j] = round_real(s.v[j]) * c.v[j];
  }
  store(y + row * h + i, s, n);
}
