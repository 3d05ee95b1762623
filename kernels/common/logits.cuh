// Log-probs and entropies from a row of logits, cut into slices of a fixed size so that many warps share it. Both the trainer's
// head and the sampler call this, so they have the same bits; a row's bits depend on the row alone.
#pragma once
#include "prim/math.cuh"
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
  WarpPack pack[SLICE_PACKS];
  int begin, vocab;
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

DEVICE float slice_max(const Slice& s) {
  WarpPack top;
#pragma unroll
  for (int j = 0; j < WV; ++j) top.v[j] = NEG_INF;
#pragma unroll
  for (int k = 0; k < SLICE_PACKS; ++k)
    if (s.has(k)) {
#pragma unroll
      for (int j = 0; j < WV; ++j) top.v[j] = max2(top.v[j], s.pack[k].v[j]);
    }
  return pack_max(top);
}

// Clamps x to the domain of exp_down.
DEVICE float no_less(float x) { return x < -86.f ? -86.f : x; }
// exp_down for any x up to about 0; 0 below -86.
DEVICE float exp_or_zero(float x) {
  const float y = exp_down(no_less(x));
  return x < -86.f ? 0.f : y;
}

// Over a slice, with d_j = scale l_j - scale max:  sum e^{d_j}  and  sum e^{d_j} d_j. d_j is clamped at -86: a term below 1e-35
// beside one of 1.
struct SliceSums {
  float sum, mean;
};
DEVICE SliceSums slice_sums(const Slice& s, float largest, float scale) {
  const float m = largest == NEG_INF ? 0.f : largest * scale;
  WarpPack sum = {}, mean = {};
#pragma unroll
  for (int k = 0; k < SLICE_PACKS; ++k)
    if (s.has(k)) {
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float d = no_less(fmaf(s.pack[k].v[j], scale, -m)), e = exp_down(d);
        sum.v[j] += e;
        mean.v[j] = fmaf(e, d, mean.v[j]);
      }
    }
  return {pack_sum(sum), pack_sum(mean)};
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
      const float d = no_less(m.v[j] * scale - top), e = exp_down(d);
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

// The first column of a row's largest value, from the maxima of its slices. If there is none (a row of NaNs): 0.
template <class Values>
DEVICE int row_first(const float* largest, int slices, int vocab, Values values) {
  const float top = row_max(largest, slices);
  int slice = 0;
  if (slices > 1) slice = first_equal(0, slices, top, [&](int i) { return load_row(largest, i, slices, NEG_INF); });
  if (slice >= slices) return 0;
  const int begin = slice * LOGIT_SLICE, end = begin + LOGIT_SLICE < vocab ? begin + LOGIT_SLICE : vocab;
  const int column = first_equal(begin, end, top, values);
  return column < end ? column : 0;
}
