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
//          On Hopper most heads have no logits in memory: the product's tiles give the statistics of parts of slices
//          (head_hopper.cu), and head_join those of the slices.
// Numerics Logits are float, also in a bf16 build: half-precision logits cost accuracy where it matters most. Sums in float in a
//          fixed order; dlogits is rounded when stored. The gradient of H in this form has no cancellation.
// Cost     The statistics read 4 vocab bytes a row; the gradient reads 4 and writes sizeof(real). 16,384 rows of 151,936 columns
//          on an H100 (2026-11-27, copy 2.97 TB/s): statistics 3.65 ms (2.72 TB/s; predicted 3.6 to 3.9; with one warp per row
//          30.4; before the slices were summed in parts), gradient 5.02 ms (2.97 TB/s; predicted 5.1; with one warp per row 9.7). What the statistics lack to copy speed
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

// Floats that head_slices and head_join write per slice.
EXPORT(int, HEAD_PARTS, 4);

// The statistics of each slice of each row; the last one (sum e^2d) only if `square` is not 0. D: load_form's.
KERNEL_WARP(head_slices, D=0,1, HOT)(float* part, const float* logits, int rows, int vocab, int slices, float scale, int square) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const auto s = load_form<D>(logits + at.row * vocab, at.slice, vocab);
  const auto tops = slice_tops(s);
  float* out = part + at.row * HEAD_PARTS * slices + at.slice;
  const LogitSums sums = square ? slice_sums<true>(s, tops, scale) : slice_sums<false>(s, tops, scale);
  if (LANE == 0) {
    out[0] = tops.largest;
    out[slices] = sums.sum;
    out[2 * slices] = sums.mean;
    out[3 * slices] = sums.square;
  }
}

// The statistics of each slice of each row from those of its parts [rows, tiles, TILE_STATS] (head_hopper.cu), with the first column
// of the largest logit for the last one.
KERNEL_FLAT(head_join)(float* part, const float* parts, int rows, int tiles, int slices, float scale) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)rows * slices) return;
  const long long row = i / slices;
  const int slice = (int)(i - row * slices);
  const JoinedSlice of = join_parts(parts + row * tiles * TILE_STATS, tiles, slice, scale);
  float* out = part + row * HEAD_PARTS * slices + slice;
  out[0] = of.largest;
  out[slices] = of.sum;
  out[2 * slices] = of.mean;
  out[3 * slices] = of.first;
}

// logp, lse and (if requested) entropy, log sum_j p_j^2 and the arg max (lowest index on ties) of each row. Where no logits are
// stored, `target_logit` has those of the targets, and `part` the columns of the maxima in place of the squares.
KERNEL_WARP(head_stats, BLOCKS=0:3, HOT)(float* logp, float* lse, MAYBE(float) entropy, MAYBE(float) square, MAYBE(int) best,
                                         const float* part, MAYBE(const float) logits, MAYBE(const float) target_logit,
                                         const int* target, int rows, int vocab, int slices, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float *l = logits + row * vocab, *largest = part + row * HEAD_PARTS * slices;
  const float t = target_logit ? target_logit[row] : l[target[row]];
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
        const float e = exp_logit(no_less(m.v[j] * scale - f.top));
        sum.v[j] = fmaf(e * e, s.v[j], sum.v[j]);
      }
    }
    const float s2 = pack_sum(sum);
    if (LANE == 0) square[row] = log_f(s2) - 2.f * f.log_sum;
  }
  if (best) {
    int first = 0;
    if (logits) {
      first = row_first(largest, slices, vocab, [&](int i) { return load_row(l, i, vocab, NEG_INF); });
    } else {
      const int slice = first_slice(largest, slices, row_max(largest, slices));
      if (slice < slices) first = (int)largest[3 * slices + slice];
    }
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
  const float part_of_cap = softcap > 0.f ? 1.f / softcap : 0.f;
  const LogitGradient grad = {scale, lse[at.row], -(a[at.row] * slope), b ? entropy[at.row] : 0.f, b ? -(b[at.row] * slope) : 0.f};
  for (int i = begin + WCOL; i < end; i += WARP_STEP) {
    const WarpPack logit = load_row(l, i, vocab, NEG_INF);
    WarpPack g;
#pragma unroll
    for (int j = 0; j < WV; ++j) g.v[j] = b ? grad.at<true>(logit.v[j], false) : grad.at<false>(logit.v[j], false);
    if ((unsigned)(t - i) < (unsigned)WV) {
#pragma unroll
      for (int j = 0; j < WV; ++j)
        if (i + j == t) g.v[j] = b ? grad.at<true>(logit.v[j], true) : grad.at<false>(logit.v[j], true);
    }
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
