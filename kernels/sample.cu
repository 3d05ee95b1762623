// Sampling of the next token of each sequence from its row of logits.
//
// Math     l' = l, or for a token that the sequence already has: l / r where l >= 0, l r where l < 0 (repetition penalty r);
//          z = l' / temperature; kept: the top_k largest, of these the smallest set of largest whose probability reaches top_p,
//          of these all with p >= min_p max p. Ties at a threshold are all kept. token ~ softmax(z | kept), by inversion of the
//          distribution function in the order of the columns at u = Philox(seed; position, number).
//          logp = log softmax(l)[token]; logp_scaled = log softmax(l / temperature)[token], and `entropy` its entropy;
//          logp_truncated = log softmax(z | kept)[token]. Greedy: the first largest l', temperature 1, logp_truncated 0.
// Shapes   logits [rows, vocab] float; who [rows, 3] int: sequence number (-1: the row is padding), position in its completion,
//          row of `seen`; seed [2] int; seen [.., words] bits of vocab; part [rows, SAMPLE_PARTS, slices] float, for each slice
//          of a row: max l, the sums of l and of l / temperature, max l', the weight used for sampling; sums [rows, SAMPLE_WAYS,
//          slices], rank, width, digit [rows] int, base, limit, top [rows]: state of a search
// Plan     A warp owns a slice of a row (common/logits.cuh). sample_slices reads it once, for the statistics of both
//          distributions; on Hopper, for 64 rows or more at temperature 1 without a penalty, sample_join takes them from the
//          product with the head. `sample`, one warp per row, combines the slices, finds the slice in which the running sum
//          passes u, and walks along that slice alone. Nothing is sorted: a threshold (top_k, top_p) is searched for in the order of the
//          floats' bits. sample_bounds bounds the threshold, sample_above sums what lies above 7 thresholds at once,
//          sample_narrow keeps an eighth of the interval: at most 11 passes whatever the values, and once one float is left the
//          other passes return at once. A slice without values in the interval is not read. With a threshold or min_p,
//          sample_kept computes the weights of the slices again.
//          Each sum has one order, and leaving out values can only lower it, so every search is over a monotone function.
// Numerics As the head's (common/logits.cuh): logp, logp_scaled and entropy have the bits of head_stats.
// Cost     Full distribution: one pass over the row, 4 vocab bytes. 256 rows of 151,936 columns on an H100 (2026-11-27, one CUDA
//          graph; before the slices were summed in parts): 84 us (copy speed alone: 52; with one warp per row 1,622), at another
//          temperature 97, min_p 128, greedy 78; one row 24. A pass of a search reads what it cannot skip: docs/kernels.md has the figures of thresholds.
#include "prim/rng.cuh"
#include "common/logits.cuh"

// Ints per row of `who`.
EXPORT(int, SAMPLE_INFO, 3);
// Rows of `sample`'s output: token, logp, logp_scaled, logp_truncated, entropy.
EXPORT(int, SAMPLE_OUTPUTS, 5);
// Floats that sample_slices writes per slice: max l; sum, mean at temperature 1; sum, mean at its own; max l'; weight.
EXPORT(int, SAMPLE_PARTS, 7);
// Intervals that one pass of a search distinguishes, and the passes that suffice for 32 bits.
EXPORT(int, SAMPLE_WAYS, 8);
EXPORT(int, SAMPLE_PASSES, 11);

// The k-th float in the order of all floats (NaNs at both ends).
DEVICE float float_of_rank(unsigned k) {
  return bits_to_float((int)(k & 0x80000000u ? k & 0x7fffffffu : ~k));
}
DEVICE unsigned rank_of_float(float v) {
  const unsigned bits = (unsigned)float_to_bits(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float penalised_value(float v, int i, const int* bits, float penalty, float inverse) {
  const bool has = (bits[i >> 5] >> (i & 31)) & 1;
  return !has ? v : v * (v < 0.f ? penalty : inverse);
}
// l' of the pack at column i; v is unchanged beyond the end of the row, where `bits` has no entry.
template <int N>
DEVICE void penalise(Pack<N>& v, int i, int vocab, const int* bits, float penalty) {
  const float inverse = 1.f / penalty;
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j < vocab) v.v[j] = penalised_value(v.v[j], i + j, bits, penalty, inverse);
}
DEVICE WarpPack penalised(const float* l, int i, int vocab, const int* bits, float penalty) {
  WarpPack v = load_row(l, i, vocab, NEG_INF);
  if (bits) penalise(v, i, vocab, bits, penalty);
  return v;
}

DEVICE const int* seen_row(const int* seen, const int* info, int words) {
  return seen ? seen + (long long)info[2] * words : seen;
}

// The statistics of each slice of each row, in `part`. D: load_form's.
KERNEL_WARP(sample_slices, D=0,1, HOT)(float* part, MAYBE(const int) seen, const float* logits, const int* who, int rows, int vocab,
                                int slices, int words, float scale, float penalty) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const int* info = who + at.row * SAMPLE_INFO;
  if (info[0] < 0) return;
  auto s = load_form<D>(logits + at.row * vocab, at.slice, vocab);
  const auto tops = slice_tops(s);
  const LogitSums plain = slice_sums<false>(s, tops, 1.f);
  LogitSums scaled = plain;
  if (scale != 1.f) scaled = slice_sums<false>(s, tops, scale);
  float z_largest = tops.largest, z_sum = scaled.sum;
  if (seen) {
    const int* bits = seen_row(seen, info, words);
#pragma unroll
    for (int k = 0; k < s.PACKS; ++k)
      if (s.has(k)) penalise(s.pack[k], s.column(k), vocab, bits, penalty);
    const auto z_tops = slice_tops(s);
    z_largest = z_tops.largest;
    z_sum = slice_sums<false>(s, z_tops, scale).sum;
  }
  if (LANE == 0) {
    float* out = part + at.row * SAMPLE_PARTS * slices + at.slice;
    out[0] = tops.largest;
    out[slices] = plain.sum;
    out[2 * slices] = plain.mean;
    out[3 * slices] = scaled.sum;
    out[4 * slices] = scaled.mean;
    out[5 * slices] = z_largest;
    out[6 * slices] = z_sum;
  }
}

// The same at temperature 1 without a penalty, from the statistics of parts [rows, tiles, TILE_STATS] (head_hopper.cu).
KERNEL_FLAT(sample_join)(float* part, const float* parts, const int* who, int rows, int tiles, int slices) {
  const long long i = FLAT_INDEX;
  if (i >= (long long)rows * slices) return;
  const long long row = i / slices;
  const int slice = (int)(i - row * slices);
  if (who[row * SAMPLE_INFO] < 0) return;
  const JoinedSlice of = join_parts(parts + row * tiles * TILE_STATS, tiles, slice, 1.f);
  float* out = part + row * SAMPLE_PARTS * slices + slice;
  out[0] = out[5 * slices] = of.largest;
  out[slices] = out[3 * slices] = out[6 * slices] = of.sum;
  out[2 * slices] = out[4 * slices] = of.mean;
}

// Bounds each row's threshold t: it is one of `width` floats from number `rank` on. t is the least float with sum of { w : v > t
// } < limit  (top_k: w = 1, limit top_k; top_p: w = e^{scale v - max}, limit top_p times the sum of all). top_k: t is not below
// the top_k-th largest of the slices' maxima. top_p: the least kept of `vocab` weights is at least (1 - top_p) / vocab of their
// sum, which is 1 or more; nor is t below `floor_rank`, where the weights are sample_kept's.
KERNEL_WARP(sample_bounds)(int* rank, int* width, int* digit, float* base, float* limit, float* top, const float* part,
                           const int* who, MAYBE(const int) floor_rank, int rows, int vocab, int slices, int count,
                           float top_p, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows || who[row * SAMPLE_INFO] < 0) return;
  const float* largest = part + (row * SAMPLE_PARTS + 5) * slices;
  const float *weight = largest + slices, most = row_max(largest, slices);
  unsigned low = rank_of_float(NEG_INF);
  float bound = (float)count;
  if (count && count <= slices) {
    unsigned found = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const float t = float_of_rank(found + (1u << bit) - 1u);
      WarpPack above = {};
      for (int i = WCOL; i < slices; i += WARP_STEP) {
        const WarpPack v = load_row(largest, i, slices, NEG_INF);
#pragma unroll
        for (int j = 0; j < WV; ++j) above.v[j] += v.v[j] > t ? 1.f : 0.f;
      }
      if (!(pack_sum(above) < bound)) found += 1u << bit;
    }
    low = found > low ? found : low;
  }
  if (!count) {
    const float m = most * scale;
    WarpPack all = {};
    for (int i = WCOL; i < slices; i += WARP_STEP) {
      const WarpPack w = load_row(weight, i, slices), v = load_row(largest, i, slices, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) all.v[j] += floor_rank ? w.v[j] : w.v[j] * exp_or_zero(v.v[j] * scale - m);
    }
    bound = top_p * pack_sum(all);
    const float reach = (log_f((float)vocab / (1.f - top_p)) + 1e-3f) / scale;
    const unsigned least = rank_of_float(most - reach), floor = floor_rank ? (unsigned)floor_rank[row] : 0u;
    low = least > low ? least : low;
    low = floor > low ? floor : low;
  }
  const unsigned high = rank_of_float(most);
  if (LANE == 0) {
    rank[row] = (int)(low < high ? low : high);
    width[row] = low < high ? (int)(high - low + 1u) : 1;
    digit[row] = -1;
    base[row] = 0.f;
    limit[row] = bound;
    top[row] = most * scale;
  }
}

// An eighth of the interval in which a threshold is searched for.
DEVICE unsigned part_of(unsigned width) { return width / SAMPLE_WAYS + (width % SAMPLE_WAYS ? 1u : 0u); }

// For each slice of each row and the thresholds t_c = number rank + c part_of(width) - 1 in the order of the floats: the sum of {
// w : v > t_c, v not above the remaining interval },  w = 1 (`count`) or e^{scale v - top}. It is 0 for a slice without values in
// the interval, as the sums of the previous pass tell.
KERNEL_WARP(sample_above, HOT)(INOUT(float) sums, MAYBE(const int) seen, const float* logits, const int* who,
                               const float* part, const int* rank, const int* width, const int* digit, const float* top,
                               int rows, int vocab, int slices, int words, int count, float scale, float penalty) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const int* info = who + at.row * SAMPLE_INFO;
  const unsigned low = (unsigned)rank[at.row], step = part_of((unsigned)width[at.row]);
  const int before = digit[at.row];
  const float m = top[at.row], largest = part[(at.row * SAMPLE_PARTS + 5) * slices + at.slice];
  if (info[0] < 0 || width[at.row] == 1) return;
  const float below = float_of_rank(low - 1u), high = float_of_rank(low + SAMPLE_WAYS * step - 1u);
  float* out = sums + at.row * SAMPLE_WAYS * slices + at.slice;
  bool none = largest <= below;
  if (before >= 0) {
    const float upper = before + 1 < SAMPLE_WAYS ? out[(before + 1) * slices] : 0.f;
    none = none | (out[before * slices] == upper);
  }
  if (none) {
    if (LANE == 0)
      for (int c = 0; c < SAMPLE_WAYS; ++c) out[c * slices] = 0.f;
    return;
  }
  const float* l = logits + at.row * vocab;
  const int* bits = seen_row(seen, info, words);
  float t[SAMPLE_WAYS];
  WarpPack above[SAMPLE_WAYS];
#pragma unroll
  for (int c = 0; c < SAMPLE_WAYS; ++c) {
    t[c] = float_of_rank(low + (unsigned)c * step - 1u);
    above[c] = {};
  }
#pragma unroll 1
  for (int k = 0; k < SLICE_PACKS; k += 4) {
    const int begin = at.slice * LOGIT_SLICE + k * WARP_STEP + WCOL;
    WarpPack four[4];  // four loads in flight; the sums need the other registers
    if (begin - WCOL + 4 * WARP_STEP <= vocab) {
#pragma unroll
      for (int q = 0; q < 4; ++q) four[q] = load<WV>(l + begin + q * WARP_STEP, WV);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) four[q] = load_row(l, begin + q * WARP_STEP, vocab, NEG_INF);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = begin + q * WARP_STEP;
      if (i - WCOL >= vocab) continue;
      WarpPack v = four[q], w;
      if (bits) penalise(v, i, vocab, bits, penalty);
      int any = 0;
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const bool in = !(v.v[j] > high) & !(v.v[j] <= below) & (i + j < vocab);
        w.v[j] = in ? (count ? 1.f : exp_or_zero(fmaf(v.v[j], scale, -m))) : 0.f;
        any |= (int)in;
      }
      if (any) {
#pragma unroll
        for (int j = 0; j < WV; ++j) above[0].v[j] += w.v[j];
#pragma unroll
        for (int c = 1; c < SAMPLE_WAYS; ++c)
#pragma unroll
          for (int j = 0; j < WV; ++j) above[c].v[j] += v.v[j] > t[c] ? w.v[j] : 0.f;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < SAMPLE_WAYS; ++c) {
    const float sum = pack_sum(above[c]);
    if (LANE == 0) out[c * slices] = sum;
  }
}

// Narrows each row's interval: it starts after the last threshold whose sum is not below the limit. base: the sum above the new
// interval.
KERNEL_WARP(sample_narrow)(INOUT(int) rank, INOUT(int) width, int* digit, INOUT(float) base, const float* limit,
                           const float* sums, const int* who, int rows, int slices) {
  const long long row = WARP_INDEX;
  if (row >= rows || who[row * SAMPLE_INFO] < 0 || width[row] == 1) return;
  const float* s = sums + row * SAMPLE_WAYS * slices;
  const unsigned low = (unsigned)rank[row], step = part_of((unsigned)width[row]);
  const float above = base[row], bound = limit[row];
  float next = above;  // the sum above the threshold after the chosen one
  int chosen = 0;
#pragma unroll
  for (int c = SAMPLE_WAYS - 1; c > 0; --c) {
    const float sum = above + slice_total(s + c * slices, slices);
    const bool here = (chosen == 0) & !(sum < bound);
    chosen = here ? c : chosen;
    next = chosen ? next : sum;
  }
  if (LANE == 0) {
    rank[row] = (int)(low + (unsigned)chosen * step);
    width[row] = (int)step;
    digit[row] = chosen;
    base[row] = next;
  }
}

// The kept values of a row: not below `floor`, and with a weight e^{scale v - m} not below min_p.
struct Kept {
  float floor, scale, m, min_p;
  DEVICE_MEMBER WarpPack weights(WarpPack v) const {
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float e = exp_or_zero(fmaf(v.v[j], scale, -m));
      v.v[j] = (v.v[j] < floor) | (e < min_p) ? 0.f : e;
    }
    return v;
  }
};

// The higher of the thresholds found.
DEVICE float kept_floor(const int* top_k_rank, const int* top_p_rank, long long row) {
  float floor = top_k_rank ? float_of_rank((unsigned)top_k_rank[row]) : NEG_INF;
  if (top_p_rank) {
    const float t = float_of_rank((unsigned)top_p_rank[row]);
    floor = t < floor ? floor : t;
  }
  return floor;
}

// The weight of the kept values of each slice of each row, in the last of its statistics in `part`.
KERNEL_WARP(sample_kept, HOT)(INOUT(float) part, MAYBE(const int) seen, const float* logits, const int* who,
                              MAYBE(const int) top_k_rank, MAYBE(const int) top_p_rank, int rows, int vocab, int slices,
                              int words, float scale, float min_p, float penalty) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const int* info = who + at.row * SAMPLE_INFO;
  if (info[0] < 0) return;
  const float* largest = part + (at.row * SAMPLE_PARTS + 5) * slices;
  float* out = part + (at.row * SAMPLE_PARTS + 6) * slices + at.slice;
  const float floor = kept_floor(top_k_rank, top_p_rank, at.row), m = row_max(largest, slices) * scale;
  const float own = largest[at.slice];
  if ((own < floor) | (exp_or_zero(fmaf(own, scale, -m)) < min_p)) {
    if (LANE == 0) *out = 0.f;
    return;
  }
  const Kept kept = {floor, scale, m, min_p};
  const int* bits = seen_row(seen, info, words);
  const Slice s = load_slice(logits + at.row * vocab, at.slice, vocab);
  WarpPack all = {};
#pragma unroll
  for (int k = 0; k < SLICE_PACKS; ++k)
    if (s.has(k)) {
      WarpPack v = s.pack[k];
      if (bits) penalise(v, s.begin + k * WARP_STEP + WCOL, vocab, bits, penalty);
      const WarpPack w = kept.weights(v);
#pragma unroll
      for (int j = 0; j < WV; ++j) all.v[j] += w.v[j];
    }
  const float sum = pack_sum(all);
  if (LANE == 0) *out = sum;
}

// Finds where the running sum of weights, `before` at `begin`, passes u. If it never does, because the sum from which u was
// computed was rounded differently: the last place with a weight. `weights(i, k)` returns pack k, at place i. PACKS packs are
// held in registers; `again(i)` loads the pack that was found once more.
struct Found {
  int column;
  float before;  // the running sum up to the column
};
template <int PACKS, class Weights, class Again>
DEVICE Found find(int begin, int end, float before, float u, Weights weights, Again again) {
  int at = begin;
  float sum = before, from = before, to = before;
  const int packs = PACKS ? PACKS : (end - begin + WARP_STEP - 1) / WARP_STEP;
#pragma unroll
  for (int k = 0; k < packs; ++k)
    if (begin + k * WARP_STEP < end) {
      const float after = sum + pack_sum(weights(begin + k * WARP_STEP + WCOL, k));
      const bool here = (after > sum) & !(to > u);
      at = here ? begin + k * WARP_STEP : at;
      from = here ? sum : from;
      to = here ? after : to;
      sum = after;
    }
  u = min2(u, bits_to_float(float_to_bits(to) - 1));
  const WarpPack w = again(at + WCOL);
  int low = 0, high = WARP_STEP - 1;
  float under = from;
  while (low < high) {
    const int middle = (low + high) / 2;
    WarpPack part;
#pragma unroll
    for (int j = 0; j < WV; ++j) part.v[j] = WCOL + j <= middle ? w.v[j] : 0.f;
    const float sum = from + pack_sum(part);
    if (sum > u) {
      high = middle;
    } else {
      low = middle + 1;
      under = sum;
    }
  }
  return {at + low, under};
}

// Samples a token and computes its log-probs. `truncates`: the weights of the slices are sample_kept's.
KERNEL_WARP(sample, BLOCKS=0:2)(int* token, float* logp, float* logp_scaled, float* logp_truncated, float* entropy,
                    MAYBE(int) seen, const float* part, const float* logits, const int* who, const int* seed, MAYBE(const int) top_k_rank,
                    MAYBE(const int) top_p_rank, int rows, int vocab, int slices, int words, int greedy, int truncates,
                    float scale, float min_p, float penalty) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const int* info = who + row * SAMPLE_INFO;
  if (info[0] < 0) {
    if (LANE == 0) {
      token[row] = 0;
      logp[row] = logp_scaled[row] = logp_truncated[row] = entropy[row] = 0.f;
    }
    return;
  }
  const float *l = logits + row * vocab, *largest = part + row * SAMPLE_PARTS * slices, *z_largest = largest + 5 * slices;
  const float* z_weight = largest + 6 * slices;
  const RowFigures plain = row_figures(largest, largest + slices, largest + 2 * slices, slices, 1.f);
  RowFigures scaled = plain;
  if (scale != 1.f) scaled = row_figures(largest, largest + 3 * slices, largest + 4 * slices, slices, scale);
  int* bits = seen ? seen + (long long)info[2] * words : seen;

  int chosen;
  float truncated = 0.f;
  if (greedy) {
    chosen = row_first(z_largest, slices, vocab, [&](int i) { return penalised(l, i, vocab, bits, penalty); });
  } else {
    const float m = row_max(z_largest, slices) * scale;
    const Kept kept = {kept_floor(top_k_rank, top_p_rank, row), scale, m, min_p};
    const auto of_slices = [&](int i) {
      WarpPack w = load_row(z_weight, i, slices);
      if (!truncates) {  // each slice's sum is in units of its own maximum
        const WarpPack top = load_row(z_largest, i, slices, NEG_INF);
#pragma unroll
        for (int j = 0; j < WV; ++j) w.v[j] *= exp_or_zero(top.v[j] * scale - m);
      }
      return w;
    };
    float total = 0.f;
    if (slices == 1) total = z_weight[0];
    else
      for (int i = 0; i < slices; i += WARP_STEP) total += pack_sum(of_slices(i + WCOL));
    const Philox bits4 = philox((unsigned)seed[0], (unsigned)seed[1], (unsigned)info[1], (unsigned)info[0], 0u, SAMPLE_TAG);
    const float u = uniform(bits4.x) * total;
    Found place = {0, 0.f};
    if (slices > 1) place = find<0>(0, slices, 0.f, u, [&](int i, int) { return of_slices(i); }, of_slices);
    const Slice s = load_slice(l, place.column < slices ? place.column : 0, vocab);
    const int end = s.begin + LOGIT_SLICE < vocab ? s.begin + LOGIT_SLICE : vocab;
    const auto held = [&](int i, int k) {
      WarpPack v = s.pack[k];
      if (bits) penalise(v, i, vocab, bits, penalty);
      return kept.weights(v);
    };
    const auto again = [&](int i) { return kept.weights(penalised(l, i, vocab, bits, penalty)); };
    chosen = find<SLICE_PACKS>(s.begin, end, place.before, u, held, again).column;
    if (chosen >= vocab) chosen = vocab - 1;  // only if no weight is a number
    const float z = bits ? penalised_value(l[chosen], chosen, bits, penalty, 1.f / penalty) : l[chosen];
    truncated = fmaf(z, scale, -m) - log_f(total);
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
