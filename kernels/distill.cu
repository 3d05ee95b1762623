// Distillation over the whole vocabulary: the divergence of a student's distribution from a teacher's, row by row, and its
// gradient. The products around it are matmul's; neither model's logits are ever whole (src/ops/distill.rs).
//
// Math     S, T the softmaxes of scale x logits, s, t their logarithms;  M = (1-b) S + b T;  KL(P, Q) = sum P log(P / Q)
//          b = 0: KL(T, S)   b = 1: KL(S, T)   between: b KL(T, M) + (1-b) KL(S, M)
//          d / dl_j = scale x:  b = 0: S_j - T_j   b = 1: S_j (s_j - t_j - KL(S, T))   between: (1-b) S_j (log(S_j/M_j) - KL(S, M))
// Shapes   student, teacher [rows, vocab] float (a chunk);  stats [rows, 5] float: maximum and log sum of each, KL(S, .);
//          each, weight [rows] float;  dlogits [rows, vocab] real
// Plan     A warp owns a row: maxima, sums, the divergence, and in a second kernel the gradient.
// Numerics float. log(S/M) and log(T/M) come from d = t - s by log1p and expm1 of -|d|, so that nearly equal distributions do
//          not cancel; a maximum and a log sum are kept apart for the same reason. A probability below e^-3000 counts as that.
// Cost     24 vocab bytes a row read for the divergence, 8 read and sizeof(real) written for the gradient. GPU: not measured yet.
#include "common/softplus.cuh"
#include "prim/warp.cuh"

// Floats of a row of `stats`.
EXPORT(int, DISTILL_STATS, 5);

// log p of a logit; what lies behind the row's end gets a log p whose probability is 0
DEVICE float log_prob(float logit, float scale, float top, float log_sum) {
  return max2(fmaf(logit, scale, -top) - log_sum, -3000.f);
}

// log(S/M) and log(T/M) from d = log(T/S)
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

KERNEL_WARP(distill_rows, HOT)(float* each, float* stats, const float* student, const float* teacher, int rows, int vocab,
                               float beta, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float *ls = student + row * vocab, *lt = teacher + row * vocab;
  WarpPack top_s, top_t;
#pragma unroll
  for (int j = 0; j < WV; ++j) top_s.v[j] = top_t.v[j] = NEG_INF;
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack s = load_row(ls, i, vocab, NEG_INF), t = load_row(lt, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      top_s.v[j] = max2(top_s.v[j], s.v[j]);
      top_t.v[j] = max2(top_t.v[j], t.v[j]);
    }
  }
  const float ms = pack_max(top_s) * scale, mt = pack_max(top_t) * scale;
  WarpPack sum_s = {}, sum_t = {};
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
    WarpPack s = load_row(ls, i, vocab, NEG_INF), t = load_row(lt, i, vocab, NEG_INF);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      sum_s.v[j] += exp_f(fmaf(s.v[j], scale, -ms));
      sum_t.v[j] += exp_f(fmaf(t.v[j], scale, -mt));
    }
  }
  const float log_s = log_f(pack_sum(sum_s)), log_t = log_f(pack_sum(sum_t));
  WarpPack value = {}, center = {};
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
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
    each[row] = v;
    float* out = stats + DISTILL_STATS * row;
    out[0] = ms;
    out[1] = log_s;
    out[2] = mt;
    out[3] = log_t;
    out[4] = beta >= 1.f ? v : c;
  }
}

// dlogits of the student: the row's weight times the gradient of its divergence
KERNEL_WARP(distill_grad, HOT)(real* dlogits, const float* student, const float* teacher, const float* stats,
                               const float* weight, int rows, int vocab, float beta, float scale) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const float *ls = student + row * vocab, *lt = teacher + row * vocab, *st = stats + DISTILL_STATS * row;
  const float ms = st[0], log_s = st[1], mt = st[2], log_t = st[3], center = st[4], up = weight[row] * scale;
  for (int i = WCOL; i < vocab; i += WARP_STEP) {
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
      s.v[j] = up * g;
    }
    store(dlogits + row * vocab + i, s, vocab - i);
  }
}
