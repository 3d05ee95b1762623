// The rows of the language-model head: from logits to log-probs and their gradients. The products around it are matmul's.
//
// Math     From the products z: logits = z / divisor, or c tanh(z / (divisor c)) with a softcap c (map_logits, in place);
//          l = scale * logits;  lse = log sum_j e^{l_j};  logp = l_t - lse;  p = e^{l - lse};  H = lse - sum_j p_j l_j
//          d logp / d l_j = 1[j = t] - p_j;   d H / d l_j = -p_j (l_j - lse + H)
//          head_grad: dz_j = slope * (1 - (logits_j / c)^2) * ( a (1[j=t] - p_j) - b p_j (l_j - lse + H) ), slope = scale /
//          divisor, a, b the upstreams of logp and H; without a softcap the middle factor is 1
// Shapes   logits [rows, vocab] float (a chunk of all rows); part [rows, HEAD_PARTS, slices] float, for each slice of a row: max
//          l, sum e^d, sum e^d d, sum e^2d with d = l - max; target, best [rows] int; logp, lse, entropy, a, b [rows] float;
//          dlogits [rows, vocab] real
// Plan     A warp owns a slice of a row (common/logits.cuh), reads it once into registers and writes its statistics to `part`;
//          then one warp per row combines them in the order of the slices. The gradient is one more pass, again one warp per
//          slice. A chunk has too few rows for one warp per row: 883 of 151,936 columns would be 7 warps an SM of an H100.
// Numerics Logits are float, also in a bf16 build: half-precision logits cost accuracy where it matters most. Sums in float in a
//          fixed order; dlogits is rounded when stored. The gradient of H in this form has no cancellation.
// Cost     The statistics read 4 vocab bytes a row; the gradient reads 4 and writes sizeof(real). 16,384 rows of 151,936 columns
//          on an H100 (2026-11-27, copy 2.97 TB/s): statistics 3.65 ms (2.72 TB/s; predicted 3.6 to 3.9; with one warp per row
//          30.4), gradient 5.02 ms (2.97 TB/s; predicted 5.1; with one warp per row 9.7). What the statistics lack to copy speed
//          is head_stats: 12 us a chunk of 883 rows.
#include "common/logits.cuh"

// Logits from the products, in place. Trainer and sampler both call this, so their logits have the same bits.
KERNEL_FLAT(map_logits)(INOUT(float) logits, long long n, float divisor, float softcap) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack z = load<V>(logits + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    z.v[j] = z.v[j] / divisor;
    if (softcap > 0.f) z.v[j] = softcap * tanh_f(z.v[j] / softcap);
  }
  store(logits + i, z, n - i);
}

// Floats that head_slices writes per slice.
EXPORT(int, HEAD_PARTS, 4);

// The statistics of each slice of each row; the last one (sum e^2d) only if `square` is not 0.
KERNEL_WARP(head_slices, HOT)(float* part, const float* logits, int rows, int vocab, int slices, float scale, int square) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const Slice s = load_slice(logits + at.row * vocab, at.slice, vocab);
  const float largest = slice_max(s);
  const SliceSums sums = slice_sums(s, largest, scale);
  float* out = part + at.row * HEAD_PARTS * slices + at.slice;
  if (LANE == 0) {
    out[0] = largest;
    out[slices] = sums.sum;
    out[2 * slices] = sums.mean;
  }
  if (square) {
    const float m = largest == NEG_INF ? 0.f : largest * scale;
    WarpPack squares = {};
#pragma unroll
    for (int k = 0; k < SLICE_PACKS; ++k)
      if (s.has(k)) {
#pragma unroll
        for (int j = 0; j < WV; ++j) {
          const float e = exp_down(no_less(fmaf(s.pack[k].v[j], scale, -m)));
          squares.v[j] = fmaf(e, e, squares.v[j]);
        }
      }
    const float s2 = pack_sum(squares);
    if (LANE == 0) out[3 * slices] = s2;
  }
}

// logp, lse and (if requested) entropy, log sum_j p_j^2 and the arg max (lowest index on ties) of each row.
KERNEL_WARP(head_stats, BLOCKS=0:3, HOT)(float* logp, float* lse, MAYBE(float) entropy, MAYBE(float) square, MAYBE(int) best,
                                         const float* part, const float* logits, const int* target, int rows, int vocab,
                                         int slices, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float *l = logits + row * vocab, *largest = part + row * HEAD_PARTS * slices;
  const float t = l[target[row]];
  const RowFigures f = row_figures(largest, largest + slices, largest + 2 * slices, slices, scale);
  if (LANE == 0) {
    lse[row] = f.top + f.log_sum;
    logp[row] = f.logp(t, scale);
    if (entropy) entropy[row] = f.entropy();
  }
  if (square) {
    const float* squares = largest + 3 * slices;
    WarpPack sum = {};
    for (int i = WCOL; i < slices; i += WARP_STEP) {
      const WarpPack m = load_row(largest, i, slices, NEG_INF), s = load_row(squares, i, slices);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float e = exp_down(no_less(m.v[j] * scale - f.top));
        sum.v[j] = fmaf(e * e, s.v[j], sum.v[j]);
      }
    }
    const float s2 = pack_sum(sum);
    if (LANE == 0) square[row] = log_f(s2) - 2.f * f.log_sum;
  }
  if (best) {
    const int first = row_first(largest, slices, vocab, [&](int i) { return load_row(l, i, vocab, NEG_INF); });
    if (LANE == 0) best[row] = first;
  }
}

// dlogits of each slice of each row from the upstreams a (of logp) and b (of the entropy, or null).
KERNEL_WARP(head_grad, HOT)(real* dlogits, const float* logits, const int* target, const float* lse,
                            MAYBE(const float) entropy, const float* a, MAYBE(const float) b, int rows, int vocab, int slices,
                            float scale, float slope, float softcap) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const float* l = logits + at.row * vocab;
  real* dl = dlogits + at.row * vocab;
  const int t = target[at.row], begin = at.slice * LOGIT_SLICE;
  const int end = begin + LOGIT_SLICE < vocab ? begin + LOGIT_SLICE : vocab;
  const float norm = lse[at.row], up = a[at.row] * slope, part_of_cap = softcap > 0.f ? 1.f / softcap : 0.f;
  const float h = b ? entropy[at.row] : 0.f, ue = b ? b[at.row] * slope : 0.f;
  for (int i = begin + WCOL; i < end; i += WARP_STEP) {
    WarpPack v = load_row(l, i, vocab, NEG_INF), g;
    const WarpPack logit = v;
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      v.v[j] = fmaf(v.v[j], scale, -norm);
      g.v[j] = -exp_or_zero(v.v[j]);
    }
    if (b) {
#pragma unroll
      for (int j = 0; j < WV; ++j) v.v[j] = ue * g.v[j] * (no_less(v.v[j]) + h);
    }
    if ((unsigned)(t - i) < (unsigned)WV) {
#pragma unroll
      for (int j = 0; j < WV; ++j) g.v[j] += i + j == t ? 1.f : 0.f;
    }
#pragma unroll
    for (int j = 0; j < WV; ++j) g.v[j] = b ? fmaf(up, g.v[j], v.v[j]) : up * g.v[j];
    if (softcap > 0.f) {
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float t = logit.v[j] * part_of_cap;
        g.v[j] *= fmaf(-t, t, 1.f);
      }
    }
    store(dl + i, g, vocab - i);
  }
}

// upstream[i] = -weight[i]: the gradient of the weighted NLL with respect to each log-prob.
KERNEL_FLAT(nll_upstream)(float* upstream, const float* weight, int rows) {
  const long long i = FLAT_INDEX;
  if (i < rows) upstream[i] = -weight[i];
}

// loss[0] = -sum_i weight[i] logp[i]. One warp.
KERNEL_WARP(weighted_nll)(float* loss, const float* logp, const float* weight, int rows) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < rows; i += WARP_STEP) {
    WarpPack l = load_row(logp, i, rows), w = load_row(weight, i, rows);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(-w.v[j], l.v[j], acc.v[j]);
  }
  const float s = pack_sum(acc);
  if (LANE == 0) loss[0] = s;
}
