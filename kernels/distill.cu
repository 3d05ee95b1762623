// The divergence of a student's distribution from a teacher's over the whole vocabulary, row by row, and its gradient. The
// products around it are matmul's; neither model's logits are ever held whole (src/ops/distill.rs).
//
// Math     S, T are the softmaxes of scale x logits, s, t their logarithms;  M = (1-b) S + b T;  KL(P, Q) = sum P log(P / Q)
//          b = 0: KL(T, S)   b = 1: KL(S, T)   between: b KL(T, M) + (1-b) KL(S, M)
//          d / dz_j of the student = slope (1 - (l_j / softcap)^2) x (with slope = scale / divisor, see kernels/head.cu):
//            b = 0: S_j - T_j   b = 1: S_j (s_j - t_j - KL(S, T))   between: (1-b) S_j (log(S_j/M_j) - KL(S, M))
// Shapes   student, teacher [rows, vocab] float (a chunk);  stats [rows, 5] float: maximum and log sum of each model, KL(S, .);
//          each, weight [rows] float;  dlogits [rows, vocab] real
// Plan     One warp per slice of a row (common/logits.cuh) in each of three passes: maxima and sums, divergence, gradient. After
//          the first and the second pass one warp per row adds up what its slices wrote to part [rows, DISTILL_PARTS, slices].
// Numerics float. log(S/M) and log(T/M) come from d = t - s by log1p and expm1 of -|d|, so that nearly equal distributions do not
//          cancel; maximum and log sum are stored separately for the same reason. Log-probs are clamped at -3000.
// Cost     The divergence reads 16 vocab bytes a row; the gradient reads 8 and writes sizeof(real). On an H100 (2026-11-27, 442
//          rows of 151,936): divergence and gradient 382 and 230 us at b = 0 and 1 (2.81, 2.91 TB/s); 983 and 830 us between,
//          where log1p, expm1 and three exponentials a value take longer than the memory.
#include "common/logits.cuh"
#include "common/softplus.cuh"

// Floats of one row of `stats`.
EXPORT(int, DISTILL_STATS, 5);
// Floats of one slice in `part`: max l, sum e^d, sum e^d d of each model; later the slice's shares of the divergence.
EXPORT(int, DISTILL_PARTS, 6);

// The log-prob of a logit. Columns past the end of the row are loaded as -inf; clamped, their probability is 0.
DEVICE float log_prob(float logit, float scale, float top, float log_sum) {
  return max2(fmaf(logit, scale, -top) - log_sum, -3000.f);
}

// log(S/M) and log(T/M) from d = log(T/S).
struct Ratios {
  float student, teacher;
};
DEVICE Ratios ratios(float d, float beta) {
  Ratios r;
  if (d <= 0.f) {
    r.student = -log1p_f(beta * expm1_f(d));
    r.teacher = d + r.student;
  } else {
    r.teacher = -log1p_f((1.f - beta) * expm1_f(-d));
    r.student = r.teacher - d;
  }
  return r;
}

// Maximum and sums of each slice of each row, for both models.
KERNEL_WARP(distill_slices, HOT)(float* part, const float* student, const float* teacher, int rows, int vocab, int slices,
                                 float scale) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  float* out = part + at.row * DISTILL_PARTS * slices + at.slice;
  for (int model = 0; model < 2; ++model) {
    const Slice s = load_slice((model ? teacher : student) + at.row * vocab, at.slice, vocab);
    const SliceTops tops = slice_tops(s);
    const LogitSums sums = slice_sums<false>(s, tops, scale);
    if (LANE == 0) {
      out[3 * model * slices] = tops.largest;
      out[(3 * model + 1) * slices] = sums.sum;
      out[(3 * model + 2) * slices] = sums.mean;
    }
  }
}

// The first four stats of each row, from its slices.
KERNEL_WARP(distill_sums)(float* stats, const float* part, int rows, int slices, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  for (int model = 0; model < 2; ++model) {
    const float* largest = part + (row * DISTILL_PARTS + 3 * model) * slices;
    const RowFigures f = row_figures(largest, largest + slices, largest + 2 * slices, slices, scale);
    if (LANE == 0) {
      stats[DISTILL_STATS * row + 2 * model] = f.top;
      stats[DISTILL_STATS * row + 2 * model + 1] = f.log_sum;
    }
  }
}

// Each slice's share of the divergence and of KL(S, .), in `part`.
KERNEL_WARP(distill_rows, HOT)(float* part, const float* student, const float* teacher, const float* stats, int rows, int vocab,
                               int slices, float beta, float scale) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const float *ls = student + at.row * vocab, *lt = teacher + at.row * vocab, *st = stats + DISTILL_STATS * at.row;
  const float ms = st[0], log_s = st[1], mt = st[2], log_t = st[3];
  const int begin = at.slice * LOGIT_SLICE, end = begin + LOGIT_SLICE < vocab ? begin + LOGIT_SLICE : vocab;
  WarpPack value = {}, center = {};
  for (int i = begin + WCOL; i < end; i += WARP_STEP) {
    WarpPack s = load_row(ls, i, vocab, NEG_INF), t = load_row(lt, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float ps = log_prob(s.v[j], scale, ms, log_s), pt = log_prob(t.v[j], scale, mt, log_t);
      const float d = pt - ps;
      if (beta <= 0.f) {
        value.v[j] = fmaf(exp_f(pt), d, value.v[j]);
      } else if (beta >= 1.f) {
        value.v[j] = fmaf(exp_f(ps), -d, value.v[j]);
      } else {
        const Ratios r = ratios(d, beta);
        const float from_s = exp_f(ps) * r.student;
        value.v[j] = fmaf(beta * exp_f(pt), r.teacher, fmaf(1.f - beta, from_s, value.v[j]));
        center.v[j] += from_s;
      }
    }
  }
  const float v = pack_sum(value), c = pack_sum(center);
  if (LANE == 0) {
    float* out = part + at.row * DISTILL_PARTS * slices + at.slice;
    out[0] = v;
    out[slices] = c;
  }
}

// The divergence of each row and the last of its stats, from its slices.
KERNEL_WARP(distill_each)(float* each, INOUT(float) stats, const float* part, int rows, int slices, float beta) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float* shares = part + row * DISTILL_PARTS * slices;
  const float v = slice_total(shares, slices), c = slice_total(shares + slices, slices);
  if (LANE == 0) {
    each[row] = v;
    stats[DISTILL_STATS * row + 4] = beta >= 1.f ? v : c;
  }
}

// dlogits of the student: the weight of the row times the gradient of its divergence.
KERNEL_WARP(distill_grad, HOT)(real* dlogits, const float* student, const float* teacher, const float* stats,
                               const float* weight, int rows, int vocab, int slices,
                               float beta, float scale, float slope, float softcap) {
  const SlicePlace at = slice_place(WARP_INDEX, slices);
  if (at.row >= rows) return;
  const long long row = at.row;
  const float *ls = student + row * vocab, *lt = teacher + row * vocab, *st = stats + DISTILL_STATS * row;
  const int begin = at.slice * LOGIT_SLICE, end = begin + LOGIT_SLICE < vocab ? begin + LOGIT_SLICE : vocab;
  const float ms = st[0], log_s = st[1], mt = st[2], log_t = st[3], center = st[4], up = weight[row] * slope;
  const float part_of_cap = softcap > 0.f ? 1.f / softcap : 0.f;
  for (int i = begin + WCOL; i < end; i += WARP_STEP) {
    WarpPack s = load_row(ls, i, vocab, NEG_INF), t = load_row(lt, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float ps = log_prob(s.v[j], scale, ms, log_s), pt = log_prob(t.v[j], scale, mt, log_t);
      float g;
      if (beta <= 0.f) {
        g = exp_f(ps) - exp_f(pt);
      } else if (beta >= 1.f) {
        g = exp_f(ps) * (ps - pt - center);
      } else {
        g = (1.f - beta) * exp_f(ps) * (ratios(pt - ps, beta).student - center);
      }
      const float t = s.v[j] * part_of_cap;
      s.v[j] = softcap > 0.f ? up * g * fmaf(-t, t, 1.f) : up * g;
    }
    store(dlogits + row * vocab + i, s, vocab - i);
  }
}
