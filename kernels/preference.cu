// The preference losses: scalar functions of a few numbers per pair. The input is the head's log-probs, summed over each
// sequence; the output is one loss and its gradient with respect to each sum.
//
// Math     segment_sums: out[s] = sum over the segment of weight x value
//          DPO family, for a pair (w, l): u = logp - ref;  s = f'(e^u) by divergence: u | 1 - e^-u | log 2 + LS(u) |
//          (e^{(a-1)u} - 1)/(a-1);  x = beta (s_w - s_l);  a, r = beta u_w, beta u_l;  e label smoothing;  SP softplus
//            sigmoid SP(-x)   hinge max(0, 1-x)   ipo (s_w/n_w - s_l/n_l - 1/(2 beta))^2   sigmoid_norm SP(-beta (s/n diff.))
//            exo_pair q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = sigmoid(x)
//            nca_pair SP(-a) + SP(a)/2 + SP(r)/2   robust ((1-e) SP(-x) - e SP(x)) / (1-2e)   bco_pair SP(-a) + SP(r)
//            sppo_hard (u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2   apo_zero sig(-a) + sig(r)   apo_down sig(a) + sig(r-a)
//            discopop SP(-x) (1-m) + e^-x m, m = sig(x/tau)   sft: the mean NLL, which the caller computes
//            aot, aot_unpaired (1-e) SP(-beta d) + e SP(beta d), d the k-th of sort(p) minus the k-th of sort(q), where
//            (p, q) = (logp_w - logp_l, ref_w - ref_l) or (u_w, u_l)
//          unpaired, label y: kto sig(-beta (u-z)) or sig(-beta (z-u));  apo_zero sig(-beta u) or sig(beta u);
//          bco SP(-(beta u - z)) or SP(beta u - z)
//          ORPO: NLL - beta LS(log odds), log odds = (p_w - p_l) - (log1mexp(p_w) - log1mexp(p_l)), p = logp / n
//          CPO: r = logp (mean per token for ipo, simpo), alpha != 0: (1 - e^{-alpha r})/alpha;  d = r_w - r_l;
//          sigmoid, simpo (1-e) SP(-t) + e SP(t), t = beta d (- gamma);  hinge max(0, 1 - beta d);  ipo (d - 1/(2 beta))^2
//          Bradley-Terry: SP(-(s_w - s_l - margin)) + c (s_w + s_l)^2
//          Papers: see the docs of src/methods. Each loss is summed over pairs with the pair's weight.
// Shapes   pairs [n, 2] float, chosen first;  weight, each, margin [n] float;  label [n] int;  starts [s+1] int
// Plan     One thread per pair computes loss and gradient together; a list of losses takes one launch each. One warp sums over
//          the pairs. Sorting is by counting: n comparisons per thread, which is cheap for the few pairs of a step.
// Numerics float in every build: there are few numbers, and a pair's gradient is a small difference.
// Cost     Negligible beside the head: 60 bytes a pair. *Predicted*: 3 us, a launch, on an H100.
#include "common/softplus.cuh"
#include "prim/warp.cuh"

// The DPO losses.
EXPORT_ENUM(dpo_loss, SIGMOID, HINGE, IPO, EXO_PAIR, NCA_PAIR, ROBUST, BCO_PAIR, SPPO_HARD, AOT, AOT_UNPAIRED, APO_ZERO,
            APO_DOWN, DISCOPOP, SFT, SIGMOID_NORM);
EXPORT_ENUM(divergence_kind, REVERSE_KL, FORWARD_KL, JS, ALPHA);
EXPORT_ENUM(unpaired_loss, KTO, APO_ZERO_UNPAIRED, BCO);
EXPORT_ENUM(cpo_loss, SIGMOID, HINGE, IPO, SIMPO);

// sums[s] = sum of weights x values over [starts[s], starts[s+1]); null weights mean 1. One warp per segment.
KERNEL_WARP(segment_sums_fwd)(float* sums, const float* values, MAYBE(const float) weights, const int* starts, int segments) {
  const long long s = WARP_INDEX;
  if (s >= segments) return;
  const int from = starts[s], n = starts[s + 1] - from;
  WarpPack acc = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack v = load_row(values + from, i, n);
    if (weights) {
      WarpPack w = load_row(weights + from, i, n);
#pragma unroll
      for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(w.v[j], v.v[j], acc.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
    }
  }
  const float sum = pack_sum(acc);
  if (LANE == 0) sums[s] = sum;
}

// dvalues = upstream of the value's segment times its weight; 0 outside all segments. One thread per value.
KERNEL_FLAT(segment_sums_bwd)(float* dvalues, const float* dsums, MAYBE(const float) weights, const int* starts, int segments,
                              int n, int accumulate) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  int low = 0, high = segments;  // first segment that ends after i
  while (low < high) {
    const int mid = (low + high) / 2;
    if (starts[mid + 1] > i) high = mid; else low = mid + 1;
  }
  float d = 0.f;
  if (low < segments && starts[low] <= i) d = dsums[low] * (weights ? weights[i] : 1.f);
  dvalues[i] = accumulate ? dvalues[i] + d : d;
}

// out = upstream[0] x grad
KERNEL_FLAT(scaled_by_upstream)(float* out, const float* grad, const float* upstream, int n, int accumulate) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const float d = upstream[0] * grad[i];
  out[i] = accumulate ? out[i] + d : d;
}

// loss = sum each + factor nll sum pair_weight, and the gradient with respect to nll. One warp.
KERNEL_WARP(pair_totals)(float* loss, MAYBE(float) dnll, const float* each, const float* pair_weight, MAYBE(const float) nll,
                         int n, float factor) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {}, weight = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack e = load_row(each, i, n), w = load_row(pair_weight, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      acc.v[j] += e.v[j];
      weight.v[j] += w.v[j];
    }
  }
  const float sum = pack_sum(acc), total = factor * pack_sum(weight);
  if (LANE == 0) {
    loss[0] = nll ? fmaf(total, nll[0], sum) : sum;
    if (dnll) dnll[0] = total;
  }
}

// mean[0] = max(floor, mean of a - b). One warp.
KERNEL_WARP(mean_difference)(float* mean, const float* a, const float* b, int n, float floor) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack x = load_row(a, i, n), y = load_row(b, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += x.v[j] - y.v[j];
  }
  const float m = pack_sum(acc) / (float)n;
  if (LANE == 0) mean[0] = m < floor ? floor : m;
}

// state = (mean, count) of the means of all batches, including this one; delta = that mean. One thread.
KERNEL_FLAT(running_mean)(float* delta, INOUT(float) state, const float* mean, float scale) {
  if (FLAT_INDEX > 0) return;
  const float count = state[1] + 1.f, now = state[0] + (mean[0] * scale - state[0]) / count;
  state[0] = now;
  state[1] = count;
  delta[0] = now;
}

DEVICE bool before(float a, float b) { return a < b || (b != b && a == a); }  // NaN last: ranks stay a permutation
DEVICE float aot_key(const float* logps, const float* base, int unpaired, int reference, int i) {
  if (!unpaired) return reference ? base[2 * i] - base[2 * i + 1] : logps[2 * i] - logps[2 * i + 1];
  return reference ? logps[2 * i + 1] - base[2 * i + 1] : logps[2 * i] - base[2 * i];
}

// Ranks and sorted values of both sides of an aot loss; side 0 in [0, n), side 1 in [n, 2n).
KERNEL_FLAT(aot_sort)(float* sorted, int* rank, const float* logps, const float* base, int n, int unpaired) {
  const long long t = FLAT_INDEX;
  if (t >= 2 * n) return;
  const int side = t >= n, i = (int)t - side * n;
  const float own = aot_key(logps, base, unpaired, side, i);
  int k = 0;
  for (int j = 0; j < n; ++j) {
    const float other = aot_key(logps, base, unpaired, side, j);
    k += before(other, own) || (!before(own, other) && j < i);
  }
  sorted[side * n + k] = own;
  rank[side * n + i] = k;
}

struct Score {
  float s, slope;
};
DEVICE Score divergence_score(int divergence, float alpha, float u) {
  Score r;
  r.s = u, r.slope = 1.f;
  if (divergence == divergence_kind::FORWARD_KL) r.s = -expm1_f(-u), r.slope = exp_f(-u);
  if (divergence == divergence_kind::JS) r.s = 0.693147181f - softplus_f(-u), r.slope = sigmoid_f(-u);
  if (divergence == divergence_kind::ALPHA) {
    const float t = (alpha - 1.f) * u, c = t > 80.f ? 80.f : t;
    r.s = expm1_f(c) / (alpha - 1.f);
    r.slope = t > 80.f ? 0.f : exp_f(c);
  }
  return r;
}

// The label-smoothed logistic loss (1-e) SP(-x) + e SP(x), and its slope.
DEVICE Score smoothed(float x, float e) {
  Score r;
  r.s = (1.f - e) * softplus_f(-x) + e * softplus_f(x);
  r.slope = e * sigmoid_f(x) - (1.f - e) * sigmoid_f(-x);
  return r;
}

// One DPO loss for each pair: its weighted value, its gradient with respect to both log-probs, the rewards.
KERNEL_FLAT(dpo_pairs)(INOUT(float) each, INOUT(float) grad, float* rewards, float* pair_weight, const float* logps, const float* base,
                       const float* lens, const float* weight, MAYBE(const float) aligned, MAYBE(const float) sorted,
                       MAYBE(const int) rank, int n, int kind, int divergence, float alpha, float beta, float e, float tau,
                       float loss_weight, int accumulate) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const float uw = logps[2 * i] - base[2 * i], ul = logps[2 * i + 1] - base[2 * i + 1];
  const float w = aligned ? weight[i] * exp_f(aligned[2 * i] + aligned[2 * i + 1]) : weight[i];
  const Score sw = divergence_score(divergence, alpha, uw), sl = divergence_score(divergence, alpha, ul);
  const float nw = max2(lens[2 * i], 1.f), nl = max2(lens[2 * i + 1], 1.f);
  const float x = beta * (sw.s - sl.s), a = beta * uw, r = beta * ul, half = 0.5f / beta;
  float loss = 0.f, slope = 0.f, gw = 0.f, gl = 0.f;  // slope: d loss / d x; gw, gl: d loss / d uw, d ul directly
  float scale = w, scale_l = w;
  switch (kind) {
    case dpo_loss::SIGMOID: loss = softplus_f(-x), slope = -sigmoid_f(-x); break;
    case dpo_loss::HINGE: loss = max2(1.f - x, 0.f), slope = x < 1.f ? -1.f : 0.f; break;
    case dpo_loss::IPO: {
      const float d = sw.s / nw - sl.s / nl - half;
      loss = d * d, gw = 2.f * d / nw * sw.slope, gl = -2.f * d / nl * sl.slope;
      break;
    }
    case dpo_loss::EXO_PAIR: {
      const float q = sigmoid_f(x), o = sigmoid_f(-x), log_p = log1p_f(-e), log_e = log_f(e);
      loss = q * (-softplus_f(-x) - log_p) + o * (-softplus_f(x) - log_e);
      slope = q * o * (x - log_p + log_e);
      break;
    }
    case dpo_loss::NCA_PAIR:
      loss = softplus_f(-a) + 0.5f * softplus_f(a) + 0.5f * softplus_f(r);
      gw = beta * (0.5f * sigmoid_f(a) - sigmoid_f(-a)), gl = 0.5f * beta * sigmoid_f(r);
      break;
    case dpo_loss::ROBUST:
      loss = ((1.f - e) * softplus_f(-x) - e * softplus_f(x)) / (1.f - 2.f * e);
      slope = (-(1.f - e) * sigmoid_f(-x) - e * sigmoid_f(x)) / (1.f - 2.f * e);
      break;
    case dpo_loss::BCO_PAIR: loss = softplus_f(-a) + softplus_f(r), gw = -beta * sigmoid_f(-a), gl = beta * sigmoid_f(r); break;
    case dpo_loss::SPPO_HARD:
      loss = (uw - half) * (uw - half) + (ul + half) * (ul + half), gw = 2.f * (uw - half), gl = 2.f * (ul + half);
      break;
    case dpo_loss::AOT:
    case dpo_loss::AOT_UNPAIRED: {  // the rejected's gradient comes from the difference at its own rank
      const int k = rank[i];
      const Score own = smoothed(beta * (sorted[k] - sorted[n + k]), e);
      // TRL multiplies the k-th difference by the k-th pair's weight
      scale = scale_l = aligned ? weight[k] * exp_f(aligned[2 * k] + aligned[2 * k + 1]) : weight[k];
      loss = own.s, gw = beta * own.slope, gl = -gw;
      if (kind == dpo_loss::AOT_UNPAIRED) {
        const int m = rank[n + i];
        scale_l = aligned ? weight[m] * exp_f(aligned[2 * m] + aligned[2 * m + 1]) : weight[m];
        gl = -beta * smoothed(beta * (sorted[m] - sorted[n + m]), e).slope;
      }
      break;
    }
    case dpo_loss::APO_ZERO:
      loss = sigmoid_f(-a) + sigmoid_f(r);
      gw = -beta * sigmoid_f(a) * sigmoid_f(-a), gl = beta * sigmoid_f(r) * sigmoid_f(-r);
      break;
    case dpo_loss::APO_DOWN: {
      const float d = beta * (uw - ul), bend = beta * sigmoid_f(d) * sigmoid_f(-d);
      loss = sigmoid_f(a) + sigmoid_f(-d), gw = beta * sigmoid_f(a) * sigmoid_f(-a) - bend, gl = bend;
      break;
    }
    case dpo_loss::DISCOPOP: {
      const float m = sigmoid_f(x / tau), o = sigmoid_f(-x / tau), y = exp_f(-x), sp = softplus_f(-x);
      loss = sp * o + y * m, slope = -sigmoid_f(-x) * o - y * m + m * o / tau * (y - sp);
      break;
    }
    case dpo_loss::SFT: break;  // added by pair_totals
    case dpo_loss::SIGMOID_NORM: {
      const float d = beta * (sw.s / nw - sl.s / nl), bend = -beta * sigmoid_f(-d);
      loss = softplus_f(-d), gw = bend / nw * sw.slope, gl = -bend / nl * sl.slope;
      break;
    }
  }
  gw = fmaf(beta * slope, sw.slope, gw) * scale * loss_weight;
  gl = fmaf(-beta * slope, sl.slope, gl) * scale_l * loss_weight;
  loss *= scale * loss_weight;
  each[i] = accumulate ? each[i] + loss : loss;
  grad[2 * i] = accumulate ? grad[2 * i] + gw : gw;
  grad[2 * i + 1] = accumulate ? grad[2 * i + 1] + gl : gl;
  rewards[2 * i] = a;
  rewards[2 * i + 1] = r;
  pair_weight[i] = w;
}

// KTO, apo_zero_unpaired, BCO: sequences with a label. `baseline` is KTO's z or BCO's running mean.
KERNEL_FLAT(unpaired_rows)(float* each, float* grad, float* rewards, const float* logps, const float* base, const int* label,
                           const float* weight, const float* baseline, int n, int kind, float beta, float desirable,
                           float undesirable) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const bool good = label[i] != 0;
  const float u = logps[i] - base[i], sign = good ? 1.f : -1.f, w = weight[i] * (good ? desirable : undesirable);
  const float x = sign * (kind == unpaired_loss::KTO                 ? beta * (u - baseline[0])
                          : kind == unpaired_loss::APO_ZERO_UNPAIRED ? beta * u
                                                                     : beta * u - baseline[0]);
  each[i] = w * (kind == unpaired_loss::BCO ? softplus_f(-x) : sigmoid_f(-x));
  grad[i] = -w * sign * beta * (kind == unpaired_loss::BCO ? sigmoid_f(-x) : sigmoid_f(x) * sigmoid_f(-x));
  rewards[i] = beta * u;
}

// -beta LS(log odds) of each pair; `odds` receives LS(log odds) and the log odds.
KERNEL_FLAT(orpo_pairs)(float* each, float* grad, float* rewards, float* odds, const float* logps, const float* lens,
                        const float* weight, int n, float beta) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const float nw = lens[2 * i], nl = lens[2 * i + 1], pw = logps[2 * i] / nw, pl = logps[2 * i + 1] / nl;
  const float x = (pw - pl) - (log1mexp_f(pw) - log1mexp_f(pl)), sp = softplus_f(-x);
  const float slope = -beta * sigmoid_f(-x) * weight[i];
  each[i] = beta * sp * weight[i];
  grad[2 * i] = slope / (-expm1_f(pw) * nw);
  grad[2 * i + 1] = -slope / (-expm1_f(pl) * nl);
  rewards[2 * i] = beta * pw;
  rewards[2 * i + 1] = beta * pl;
  odds[2 * i] = -sp;
  odds[2 * i + 1] = x;
}

// CPO with one of cpo_loss; ipo and simpo use the mean per token.
KERNEL_FLAT(cpo_pairs)(float* each, float* grad, float* rewards, const float* logps, const float* lens, const float* weight, int n,
                       int kind, float beta, float e, float gamma, float alpha) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const bool mean = kind == cpo_loss::IPO || kind == cpo_loss::SIMPO;
  const float nw = mean ? lens[2 * i] : 1.f, nl = mean ? lens[2 * i + 1] : 1.f;
  float rw = logps[2 * i] / nw, rl = logps[2 * i + 1] / nl, sw = 1.f / nw, sl = 1.f / nl;
  if (alpha != 0.f) {
    sw *= exp_f(-alpha * rw), sl *= exp_f(-alpha * rl);
    rw = -expm1_f(-alpha * rw) / alpha, rl = -expm1_f(-alpha * rl) / alpha;
  }
  const float d = rw - rl, x = beta * d - (kind == cpo_loss::SIMPO ? gamma : 0.f);
  float loss, slope;  // slope: d loss / d d
  if (kind == cpo_loss::HINGE) {
    loss = max2(1.f - x, 0.f), slope = x < 1.f ? -beta : 0.f;
  } else if (kind == cpo_loss::IPO) {
    const float t = d - 0.5f / beta;
    loss = t * t, slope = 2.f * t;
  } else {
    const Score s = smoothed(x, e);
    loss = s.s, slope = beta * s.slope;
  }
  each[i] = loss * weight[i];
  grad[2 * i] = slope * sw * weight[i];
  grad[2 * i + 1] = -slope * sl * weight[i];
  rewards[2 * i] = beta * rw;
  rewards[2 * i + 1] = beta * rl;
}

// Bradley-Terry with a margin and a penalty that centres the pair's scores at 0.
KERNEL_FLAT(bradley_terry_pairs)(float* each, float* grad, const float* scores, MAYBE(const float) margin, const float* weight, int n,
                                 float center) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const float a = scores[2 * i], b = scores[2 * i + 1], w = weight[i], sum = a + b;
  const float x = a - b - (margin ? margin[i] : 0.f), slope = -sigmoid_f(-x);
  each[i] = w * (softplus_f(-x) + center * sum * sum);
  grad[2 * i] = w * (slope + 2.f * center * sum);
  grad[2 * i + 1] = w * (-slope + 2.f * center * sum);
}
