// Drawing the next token of each sequence from its row of logits.
//
// Math     l' = l, or for a token that the sequence has: l / r where l >= 0, l r where l < 0 (repetition penalty r);
//          z = l' / temperature; kept: the top_k largest, of these the smallest set of largest whose probability reaches
//          top_p, of these all with p >= min_p max p. Of equal values all are kept. token ~ softmax(z | kept), by inversion
//          of the distribution function in the order of the columns at u = Philox(seed; position, number).
//          logp = log softmax(l)[token]; logp_scaled = log softmax(l / temperature)[token], and `entropy` its entropy;
//          logp_truncated = log softmax(z | kept)[token]. Greedy: the lowest of the largest l', temperature 1, 0.
// Shapes   logits [rows, vocab] float; who [rows, 3] int: sequence number (-1: the row is padding), position in its
//          completion, row of `seen`; seed [2] int; seen [.., words] bits of vocab; work [rows, vocab] float
// Plan     A warp owns a row. Nothing is sorted: a threshold is found bit by bit, from the highest, in the order that the
//          floats' bits have; each bit is a pass that sums what lies above. The draw finds the pack of columns in which
//          the running sum passes u, then the column by halving it. Each sum has one order, and leaving out values can only
//          lower it, so every search is over a monotone function.
// Numerics As the head's (common/logits.cuh): logp, logp_scaled and entropy have the bits of head_stats.
// Cost     Full distribution: 5 passes over the row (4 vocab bytes each; the first from memory, the others from cache), 6
//          at another temperature; a threshold of top_k or top_p: 32 more. GPU: not measured yet.
#include "prim/rng.cuh"
#include "common/logits.cuh"

// Ints of a row of `who`.
EXPORT(int, SAMPLE_INFO, 3);
// Rows of numbers that `sample` gives: token, logp, logp_scaled, logp_truncated, entropy.
EXPORT(int, SAMPLE_OUTPUTS, 5);

// The float that is number k in the order of all floats (NaNs at both ends).
DEVICE float float_of_rank(unsigned k) {
  return bits_to_float((int)(k & 0x80000000u ? k & 0x7fffffffu : ~k));
}

// The least t with  sum of { w_j : v_j > t, v_j not below floor } < limit:  w = 1 (COUNT) or e^{scale v - m}. NaN if even
// everything is not enough: then nothing is to be left out, and `v < NaN` leaves nothing out.
template <bool COUNT>
DEVICE float threshold(const float* l, int vocab, float floor, float scale, float m, float limit) {
  unsigned rank = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const float t = float_of_rank(rank + (1u << bit) - 1);
    WarpPack above = {};
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float w = COUNT ? 1.f : exp_f(fmaf(v.v[j], scale, -m));
        above.v[j] += (v.v[j] > t) & !(v.v[j] < floor) ? w : 0.f;
      }
    }
    if (!(pack_sum(above) < limit)) rank += 1u << bit;
  }
  return float_of_rank(rank);
}

// The weights of one pack of columns: e^{scale v - m} of those kept.
DEVICE WarpPack kept_weights(const float* l, int i, int vocab, float floor, float scale, float m, float min_p) {
  WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
  for (int j = 0; j < WV; ++j) {
    const float e = exp_f(fmaf(v.v[j], scale, -m));
    v.v[j] = (v.v[j] < floor) | (e < min_p) ? 0.f : e;
  }
  return v;
}

KERNEL_WARP(sample)(int* token, float* logp, float* logp_scaled, float* logp_truncated, float* entropy, MAYBE(int) seen,
                    MAYBE(float) work, const float* logits, const int* who, const int* seed, int rows, int vocab, int words,
                    int greedy, float scale, int top_k, float top_p, float min_p, float penalty) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const int number = who[row * SAMPLE_INFO], position = who[row * SAMPLE_INFO + 1];
  if (number < 0) {
    if (LANE == 0) {
      token[row] = 0;
      logp[row] = logp_scaled[row] = logp_truncated[row] = entropy[row] = 0.f;
    }
    return;
  }
  const float* l = logits + row * vocab;
  const float largest = row_max(l, vocab);
  const RowFigures plain = row_figures(l, vocab, largest, 1.f);
  RowFigures scaled = plain;
  if (scale != 1.f) scaled = row_figures(l, vocab, largest, scale);

  const float* z = l;
  float top = largest;
  int* bits = seen ? seen + (long long)who[row * SAMPLE_INFO + 2] * words : seen;
  if (bits) {
    float* penalised = work + row * vocab;  // a lane reads back only the columns that it wrote
    for (int i = WCOL; i < vocab; i += WARP_STEP) {
      WarpPack v = load_row(l, i, vocab, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const bool has = i + j < vocab && (bits[(i + j) >> 5] >> ((i + j) & 31)) & 1;
        if (has) v.v[j] = v.v[j] < 0.f ? v.v[j] * penalty : v.v[j] / penalty;
      }
      store(penalised + i, v, vocab - i);
    }
    z = penalised;
    top = row_max(z, vocab);
  }

  int chosen;
  float truncated = 0.f;
  if (greedy) {
    chosen = row_first(z, vocab, top, 1.f);
  } else {
    const float m = top * scale;
    float floor = NEG_INF;
    if (top_k > 0 && top_k < vocab) floor = threshold<true>(z, vocab, floor, scale, m, (float)top_k);
    if (top_p < 1.f) {
      WarpPack all = {};
      for (int i = WCOL; i < vocab; i += WARP_STEP) {
        const WarpPack w = kept_weights(z, i, vocab, floor, scale, m, 0.f);
#pragma unroll
        for (int j = 0; j < WV; ++j) all.v[j] += w.v[j];
      }
      const float t = threshold<false>(z, vocab, floor, scale, m, top_p * pack_sum(all));
      floor = t < floor ? floor : t;
    }
    float total = 0.f;
    for (int base = 0; base < vocab; base += WARP_STEP)
      total += pack_sum(kept_weights(z, base + WCOL, vocab, floor, scale, m, min_p));
    const Philox bits4 = philox((unsigned)seed[0], (unsigned)seed[1], (unsigned)position, (unsigned)number, 0u, SAMPLE_TAG);
    const float below = bits_to_float(float_to_bits(total) - 1);  // u can be 1
    const float u = min2(uniform(bits4.x) * total, below);
    int base = 0;
    float before = 0.f;
    for (; base + WARP_STEP < vocab; base += WARP_STEP) {
      const float after = before + pack_sum(kept_weights(z, base + WCOL, vocab, floor, scale, m, min_p));
      if (after > u) break;
      before = after;
    }
    const WarpPack w = kept_weights(z, base + WCOL, vocab, floor, scale, m, min_p);
    int low = 0, high = WARP_STEP - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      WarpPack part;
#pragma unroll
      for (int j = 0; j < WV; ++j) part.v[j] = WCOL + j <= middle ? w.v[j] : 0.f;
      if (before + pack_sum(part) > u) high = middle;
      else low = middle + 1;
    }
    chosen = base + low;
    const WarpPack v = load_row(z, base + WCOL, vocab, 0.f);
    WarpPack its;
#pragma unroll
    for (int j = 0; j < WV; ++j) its.v[j] = WCOL + j == low ? fmaf(v.v[j], scale, -m) : 0.f;
    truncated = pack_sum(its) - log_f(total);
  }
  if (LANE == 0) {
    token[row] = chosen;
    logp[row] = plain.logp(l[chosen], 1.f);
    logp_scaled[row] = scaled.logp(l[chosen], scale);
    logp_truncated[row] = truncated;
    entropy[row] = scaled.entropy();
    if (bits) bits[chosen >> 5] |= (int)(1u << (chosen & 31));
  }
}
