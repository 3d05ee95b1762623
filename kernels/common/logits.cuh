// Log-probs and entropies from a row of logits, cut into slices of a fixed size so that many warps share it. Both the trainer's
// head and the sampler call this, so they have the same bits; a row's bits depend on the row alone.
#pragma once
#include "common/logit_parts.cuh"
#include "prim/warp.cuh"

// Columns of a slice. One warp reads it once and keeps it in registers: on a GPU a lane has 8 loads of 128 bits in flight.
EXPORT(int, LOGIT_SLICE, 1024);
constexpr int SLICE_PACKS = LOGIT_SLICE / WARP_STEP;

// The row and slice of this warp; warps are numbered row by row.
struct SlicePlace {
  long long row;
  int slice;
};
DEVICE SlicePlace slice_place(long long index, int slices) {
  const unsigned i = (unsigned)index, row = i / (unsigned)slices;  // 32 bits suffice: rows times slices stays far below
  return {(long long)row, (int)(i - row * (unsigned)slices)};
}

struct Slice {
  static constexpr int PACKS = SLICE_PACKS;
  WarpPack pack[PACKS];
  int begin, vocab;
  // The column of this lane's first value of pack k.
  DEVICE_MEMBER int column(int k) const { return begin + k * WARP_STEP + WCOL; }
  // Whether the slice has a pack k. All lanes agree.
  DEVICE_MEMBER bool has(int k) const { return begin + k * WARP_STEP < vocab; }
};

DEVICE Slice load_slice(const float* l, int slice, int vocab) {
  Slice s;
  s.begin = slice * LOGIT_SLICE;
  s.vocab = vocab;
  const float* p = l + s.begin + WCOL;
  if (s.begin + LOGIT_SLICE <= vocab) {  // no branches: every load is issued before the first is used
#pragma unroll
    for (int k = 0; k < SLICE_PACKS; ++k) s.pack[k] = load<WV>(p + k * WARP_STEP, WV);
  } else {
#pragma unroll
    for (int k = 0; k < SLICE_PACKS; ++k)
      if (s.has(k)) s.pack[k] = load<WV>(p + k * WARP_STEP, vocab - s.begin - k * WARP_STEP - WCOL, NEG_INF);
  }
  return s;
}

constexpr int SLICE_PARTS = LOGIT_SLICE / LOGIT_PART;
DEVICE float parts_total(const float (&part)[SLICE_PARTS]) {
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// Statistics of a slice whose columns in a pack are a chain each: in a float run, whose head has no tiles that give those of parts.
struct SliceTops {
  float largest;
};
DEVICE SliceTops slice_tops(const Slice& s) {
  WarpPack top;
#pragma unroll
  for (int j = 0; j < WV; ++j) top.v[j] = NEG_INF;
#pragma unroll
  for (int k = 0; k < SLICE_PACKS; ++k)
    if (s.has(k)) {
#pragma unroll
      for (int j = 0; j < WV; ++j) top.v[j] = max2(top.v[j], s.pack[k].v[j]);
    }
  return {pack_max(top)};
}

// `square` of the result only with SQUARES.
template <bool SQUARES>
DEVICE LogitSums slice_sums(const Slice& s, const SliceTops& tops, float scale) {
  const float top = scaled_top(tops.largest, scale);
  WarpPack sum = {}, mean = {}, square = {};
#pragma unroll
  for (int k = 0; k < SLICE_PACKS; ++k)
    if (s.has(k)) {
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float d = no_less(fmaf(s.pack[k].v[j], scale, -top)), e = exp_logit(d);
        sum.v[j] += e;
        mean.v[j] = fmaf(e, d, mean.v[j]);
        if (SQUARES) square.v[j] = fmaf(e, e, square.v[j]);
      }
    }
  return {pack_sum(sum), pack_sum(mean), SQUARES ? pack_sum(square) : 0.f};
}

// A slice whose statistics are added up part by part: in a bf16 run. With 32 lanes, pack k of lane 4 p + q has columns 16 k + 4 q to
// 16 k + 4 q + 3 of part p; a single lane has part k in pack k.
constexpr int PART_PACK = LANES == 32 ? 4 : LOGIT_PART;
struct Parts {
  static constexpr int PACKS = SLICE_PARTS;
  Pack<PART_PACK> pack[PACKS];
  int begin, vocab;
  // The column of this lane's first value of pack k.
  DEVICE_MEMBER int column(int k) const {
    return begin + (LANES == 32 ? LANE / 4 * LOGIT_PART + k * 16 + LANE % 4 * 4 : k * LOGIT_PART);
  }
  // Whether to look at pack k. All lanes agree.
  DEVICE_MEMBER bool has(int k) const { return LANES == 32 || begin + k * LOGIT_PART < vocab; }
};

DEVICE Parts load_parts(const float* l, int slice, int vocab) {
  Parts s;
  s.begin = slice * LOGIT_SLICE;
  s.vocab = vocab;
  if (s.begin + LOGIT_SLICE <= vocab) {
#pragma unroll
    for (int k = 0; k < SLICE_PARTS; ++k) s.pack[k] = load<PART_PACK>(l + s.column(k), PART_PACK);
  } else {
#pragma unroll
    for (int k = 0; k < SLICE_PARTS; ++k)
      if (s.has(k)) s.pack[k] = load<PART_PACK>(l + s.column(k), vocab - s.column(k), NEG_INF);
  }
  return s;
}

// The largest value of each of the parts that this lane has a share of, and that of the slice.
constexpr int OWN_PARTS = LANES == 32 ? 1 : SLICE_PARTS;
struct PartTops {
  float part[OWN_PARTS], largest;
};
DEVICE PartTops slice_tops(const Parts& s) {
  PartTops tops;
  float largest = NEG_INF;
#if LANES == 32
#pragma unroll
  for (int k = 0; k < SLICE_PARTS; ++k)
#pragma unroll
    for (int j = 0; j < PART_PACK; ++j) largest = max_fast(largest, s.pack[k].v[j]);
  largest = max_fast(largest, shfl_xor(largest, 1));
  tops.part[0] = largest = max_fast(largest, shfl_xor(largest, 2));
#pragma unroll
  for (int m = 4; m < 32; m <<= 1) largest = max_fast(largest, shfl_xor(largest, m));
#else
  for (int k = 0; k < SLICE_PARTS; ++k) {
    tops.part[k] = NEG_INF;
    if (!s.has(k)) continue;
    float top[LOGIT_PART];
    for (int i = 0; i < LOGIT_PART; ++i) top[i] = s.pack[k].v[i];
    for (int m = LOGIT_PART / 2; m > 0; m >>= 1)
      for (int i = 0; i < m; ++i) top[i] = max2(top[i], top[i + m]);
    tops.part[k] = top[0];
    largest = max2(largest, top[0]);
  }
#endif
  tops.largest = largest;
  return tops;
}

// The sum of a part over the lanes that share it, from this lane's sums of pairs of columns that differ in bit 6.
#if LANES == 32
constexpr int OWN_PAIRS = SLICE_PARTS / 2 * PART_PACK;  // pair 4 k + j: value j of packs k and k + 4
DEVICE float part_total(float (&s)[OWN_PAIRS]) {
  float by_column[PART_PACK];
#pragma unroll
  for (int j = 0; j < PART_PACK; ++j) {
    by_column[j] = (s[j] + s[8 + j]) + (s[4 + j] + s[12 + j]);  // bits 5 and 4
    by_column[j] += shfl_xor(by_column[j], 2);                  // bit 3
  }
  float low = by_column[0] + by_column[1], high = by_column[2] + by_column[3];  // bit 0
  low += shfl_xor(low, 1);                                                      // bit 2
  high += shfl_xor(high, 1);
  return low + high;
}
DEVICE float parts_total(const float (&part)[1]) {
  float v = part[0];
#pragma unroll
  for (int m = 16; m > 2; m >>= 1) v += shfl_xor(v, m);
  return v;
}
#else
constexpr int OWN_PAIRS = LOGIT_PART / 2;
DEVICE float part_total(float (&s)[OWN_PAIRS]) {
  for (int m = OWN_PAIRS / 2; m > 4; m >>= 1)
    for (int i = 0; i < m; ++i) s[i] += s[i + m];
  return ((s[0] + s[1]) + (s[4] + s[5])) + ((s[2] + s[3]) + (s[6] + s[7]));
}
#endif

// `square` of the result only with SQUARES.
template <bool SQUARES>
DEVICE LogitSums slice_sums(const Parts& s, const PartTops& tops, float scale) {
  float sum[OWN_PARTS], mean[OWN_PARTS], square[OWN_PARTS];
#pragma unroll
  for (int p = 0; p < OWN_PARTS; ++p) {
    sum[p] = mean[p] = square[p] = 0.f;
    if (!s.has(p)) continue;
    const float top = scaled_top(tops.part[p], scale);
    float sums[OWN_PAIRS], means[OWN_PAIRS], squares[OWN_PAIRS];
#pragma unroll
    for (int i = 0; i < OWN_PAIRS; ++i) {
      constexpr int HALF = SLICE_PARTS / 2;
      const float low = LANES == 32 ? s.pack[i / PART_PACK].v[i % PART_PACK] : s.pack[p].v[i];
      const float high = LANES == 32 ? s.pack[HALF + i / PART_PACK].v[i % PART_PACK] : s.pack[p].v[OWN_PAIRS + i];
      const LogitSums terms = pair_of_terms(low, high, scale, top);
      sums[i] = terms.sum;
      means[i] = terms.mean;
      squares[i] = terms.square;
    }
    LogitSums own = {part_total(sums), part_total(means), SQUARES ? part_total(squares) : 0.f};
    own = share_of(own, tops.part[p], tops.largest, scale);
    sum[p] = own.sum;
    mean[p] = own.mean;
    square[p] = own.square;
  }
  return {parts_total(sum), parts_total(mean), SQUARES ? parts_total(square) : 0.f};
}

// The slice in the form of a float run (0) or of a bf16 run (1).
template <int FORM>
DEVICE auto load_form(const float* l, int slice, int vocab) {
  if constexpr (FORM == 1)
    return load_parts(l, slice, vocab);
  else
    return load_slice(l, slice, vocab);
}

// The statistics of a slice from those of its parts, at `parts` [tiles, TILE_STATS] of a row; `first`: the first column of the
// largest logit.
struct JoinedSlice {
  float largest, sum, mean, first;
};
DEVICE JoinedSlice join_parts(const float* parts, int tiles, int slice, float scale) {
  float largest[SLICE_PARTS], sum[SLICE_PARTS], mean[SLICE_PARTS], first[SLICE_PARTS];
#pragma unroll
  for (int k = 0; k < SLICE_PARTS; ++k) {
    const int tile = slice * SLICE_PARTS + k;
    Pack<TILE_STATS> of = {{NEG_INF, 0.f, 0.f, 0.f}};
    if (tile < tiles) of = load<TILE_STATS>(parts + (long long)tile * TILE_STATS, TILE_STATS);
    largest[k] = of.v[0];
    sum[k] = of.v[1];
    mean[k] = of.v[2];
    first[k] = of.v[3];
  }
  float top = largest[0], column = 0.f;
#pragma unroll
  for (int k = 1; k < SLICE_PARTS; ++k) top = max_fast(top, largest[k]);
#pragma unroll
  for (int k = SLICE_PARTS - 1; k >= 0; --k) {
    column = largest[k] == top ? first[k] : column;
    const LogitSums share = share_of({sum[k], mean[k], 0.f}, largest[k], top, scale);
    sum[k] = share.sum;
    mean[k] = share.mean;
  }
  return {top, parts_total(sum), parts_total(mean), column};
}

// If a row has one slice, its statistics are that slice's (e^0 is 1, exactly): the case of a small vocabulary on a CPU.
DEVICE float row_max(const float* l, int n) {
  float largest = l[0];
  if (n > 1) {
    WarpPack top;
#pragma unroll
    for (int j = 0; j < WV; ++j) top.v[j] = NEG_INF;
    for (int i = WCOL; i < n; i += WARP_STEP) {
      WarpPack v = load_row(l, i, n, NEG_INF);
#pragma unroll
      for (int j = 0; j < WV; ++j) top.v[j] = max2(top.v[j], v.v[j]);
    }
    largest = pack_max(top);
  }
  return largest;
}

// With d_j = scale (l_j - max l):  log_sum = log sum_j e^{d_j};  centered = sum_j p_j d_j;  H = log_sum - centered.
struct RowFigures {
  float top;  // scale max l
  float log_sum, centered;
  DEVICE_MEMBER float logp(float l, float scale) const { return (l * scale - top) - log_sum; }
  DEVICE_MEMBER float entropy() const { return log_sum - centered; }
};

// Combines the maxima and sums of a row's slices.
DEVICE RowFigures row_figures(const float* largest, const float* sums, const float* means, int slices, float scale) {
  const float top = row_max(largest, slices) * scale;
  if (slices == 1) return {top, log_f(sums[0]), means[0] / sums[0]};
  WarpPack sum = {}, mean = {};
  for (int i = WCOL; i < slices; i += WARP_STEP) {
    const WarpPack m = load_row(largest, i, slices, NEG_INF), s = load_row(sums, i, slices), c = load_row(means, i, slices);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float d = no_less(m.v[j] * scale - top), e = exp_logit(d);
      sum.v[j] = fmaf(e, s.v[j], sum.v[j]);
      mean.v[j] = fmaf(e, fmaf(s.v[j], d, c.v[j]), mean.v[j]);
    }
  }
  const float s = pack_sum(sum);
  return {top, log_f(s), pack_sum(mean) / s};
}

// The sum of one statistic over a row's slices.
DEVICE float slice_total(const float* of_slices, int slices) {
  if (slices == 1) return of_slices[0];
  WarpPack all = {};
  for (int i = WCOL; i < slices; i += WARP_STEP) {
    const WarpPack part = load_row(of_slices, i, slices);
#pragma unroll
    for (int j = 0; j < WV; ++j) all.v[j] += part.v[j];
  }
  return pack_sum(all);
}

// The first column from `begin` to `end` whose value is `top`; `values(i)` returns the pack at column i.
template <class Values>
DEVICE int first_equal(int begin, int end, float top, Values values) {
  WarpPack first;
#pragma unroll
  for (int j = 0; j < WV; ++j) first.v[j] = -16777216.f;
#pragma unroll 4
  for (int i = begin + WCOL; i < end; i += WARP_STEP) {
    const WarpPack v = values(i);
#pragma unroll
    for (int j = 0; j < WV; ++j)
      first.v[j] = max2(first.v[j], (v.v[j] == top) & (i + j < end) ? -(float)(i + j) : -16777216.f);
  }
  return (int)-pack_max(first);
}

// The first slice whose maximum is `top`, the row's. In a row of NaNs there may be none: `slices`.
DEVICE int first_slice(const float* largest, int slices, float top) {
  if (slices == 1) return 0;
  return first_equal(0, slices, top, [&](int i) { return load_row(largest, i, slices, NEG_INF); });
}

// The first column of a row's largest value, from the maxima of its slices. If there is none: 0.
template <class Values>
DEVICE int row_first(const float* largest, int slices, int vocab, Values values) {
  const float top = row_max(largest, slices);
  const int slice = first_slice(largest, slices, top);
  if (slice >= slices) return 0;
  const int begin = slice * LOGIT_SLICE, end = begin + LOGIT_SLICE < vocab ? begin + LOGIT_SLICE : vocab;
  const int column = first_equal(begin, end, top, values);
  return column < end ? column : 0;
}
