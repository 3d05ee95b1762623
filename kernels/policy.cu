// Policy losses of online RL on the log-probs of the sampled tokens, with their gradient; PPO's value loss; generalised advantage
// estimation; masked whitening.
//
// Math     Over a sequence with tokens t and mask m_t = [weight_t != 0]:  d_t = logp_t - old_t, and the log of the ratio
//            level 0 (token)     l_t = d_t
//            level 1 (mean)      l   = sum m d / max(1, sum m)             (GSPO)
//            level 2 (sum)       l   = sum m d                            (RLOO)
//          r = e^l;  c_t by loss, with A the advantage and hat = no gradient:
//            D=0 clip   -min( min(r, delta) A, clamp(r, 1 - low, 1 + high) A )
//            D=1 cispo  -hat(min(r, high)) A logp_t
//            D=2 sapo   -sigmoid(tau (r - 1)) (4 / tau) A,  tau = tau_pos if A > 0 else tau_neg
//            D=3 vespo  -hat(phi) A logp_t,  phi = e^(lambda + k log w - lambda w),
//                       log w = clamp( sum m clamp(d, -20, 20) + log_is, log 1e-8, 20 ),  k, lambda by A >= 0
//          k3_t = e^(ref_t - logp_t) - (ref_t - logp_t) - 1;  kl_t = k3_t, or k3_t r with the bias correction
//          loss = sum_t weight_t (scale_t c_t + beta kl_t).  If both arguments of min are equal they share the gradient, as in
//          PyTorch.
//          (the losses of TRL 1.16.0; papers: GRPO 2402.03300, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585,
//          SAPO 2511.20347, VESPO 2602.10693, RLOO 2402.14740, dual clip 1912.09729, unbiased KL 2512.02556)
//          value:  1/2 weight max( (v - R)^2, (clamp(v, old - c, old + c) - R)^2 )      (PPO, 1707.06347)
//          gae:    A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1},  R = A + V,  0 after the last token (1506.02438)
//          whiten: (x - mean) / sqrt(var + 1e-8) (+ mean unless `shift`) over mask != 0, var with Bessel; 0 elsewhere
// Shapes   all [n] float except starts [sequences + 1] int, log_is [sequences], loss and upstream [1]
// Plan     policy_loss: one warp per sequence, with one pass for its sums, one for the tokens, and one more to distribute a
//          gradient that belongs to the whole sequence. value_loss: one warp per 1024 tokens. One warp sums over the sequences,
//          in order. gae: one thread per sequence, right to left. whiten: one warp computes the moments.
// Numerics float. k3 and its derivative use a series near 0, where the difference cancels.
// Cost     policy_loss about 40 n bytes; gae is bound by the latency of one load per token. *Predicted*: policy_loss 3 us, a
//          launch, on an H100.
#include "prim/math.cuh"
#include "prim/warp.cuh"

// The loss terms, D of policy_loss.
EXPORT_ENUM(policy_term, CLIP, CISPO, SAPO, VESPO);
// The level at which the ratio is taken.
EXPORT_ENUM(ratio_level, TOKEN, SEQUENCE, SEQUENCE_SUM);
// Tokens per warp of value_loss.
EXPORT(int, VALUE_CHUNK, 1024);

constexpr float LOG_1E8 = -18.4206807f;

DEVICE float clamp_f(float x, float low, float high) { return min2(max2(x, low), high); }

// e^x - 1 - x
DEVICE float k3(float x) {
  float p = 2.755731922e-6f;
  p = fmaf(p, x, 2.480158730e-5f);
  p = fmaf(p, x, 1.984126984e-4f);
  p = fmaf(p, x, 1.388888889e-3f);
  p = fmaf(p, x, 8.333333333e-3f);
  p = fmaf(p, x, 4.166666667e-2f);
  p = fmaf(p, x, 1.666666667e-1f);
  p = fmaf(p, x, 0.5f);
  const float near = p * x * x, far = exp_f(x) - x - 1.f;
  return x < 0.5f && x > -0.5f ? near : far;
}

// seq_loss [sequences]; ratio [n]: r (vespo: phi); kl [n]; clip [n]: 1 where r is below its bound and A < 0, 2 where it is above
// and A > 0; dlogp [n]: the gradient of the loss. D: the loss term.
KERNEL_WARP(policy_loss, D=0,1,2,3)(float* seq_loss, float* ratio, float* kl, float* clip, float* dlogp, const float* logp,
                                    const float* old, const float* advantage, const float* weight, MAYBE(const float) ref_logp,
                                    MAYBE(const float) scale, MAYBE(const float) log_is, const int* starts, int sequences,
                                    int level, float low, float high, float delta, float beta, int bias_correction,
                                    float pos_a, float neg_a, float pos_b, float neg_b) {
  const long long seq = WARP_INDEX;
  if (seq >= sequences) return;
  const long long at = starts[seq];
  const int n = starts[seq + 1] - starts[seq];
  float seq_l = 0.f, count = 1.f, log_w = 0.f;
  if (level != ratio_level::TOKEN || D == policy_term::VESPO) {
    WarpPack sum = {}, tokens = {}, sum_w = {};
    for (int i = WCOL; i < n; i += WARP_STEP) {
      WarpPack a = load_row(logp + at, i, n), b = load_row(old + at, i, n), w = load_row(weight + at, i, n);
#pragma unroll
      for (int j = 0; j < WV; ++j) {
        const float m = w.v[j] != 0.f ? 1.f : 0.f, d = m != 0.f ? a.v[j] - b.v[j] : 0.f;
        sum.v[j] += d;
        tokens.v[j] += m;
        sum_w.v[j] += clamp_f(d, -20.f, 20.f);
      }
    }
    count = max2(pack_sum(tokens), 1.f);
    seq_l = pack_sum(sum) / (level == ratio_level::SEQUENCE ? count : 1.f);
    if (level == ratio_level::SEQUENCE_SUM) count = 1.f;
    if (D == policy_term::VESPO) log_w = clamp_f(pack_sum(sum_w) + (log_is ? log_is[seq] : 0.f), LOG_1E8, 20.f);
  }
  WarpPack total = {}, shared = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack lp = load_row(logp + at, i, n), a = load_row(advantage + at, i, n), w = load_row(weight + at, i, n);
    WarpPack b = load_row(old + at, i, n), rf = {}, s = {};
    if (ref_logp) rf = load_row(ref_logp + at, i, n);
    if (scale) s = load_row(scale + at, i, n);
    WarpPack own = {}, r_out = {}, kl_out = {}, clip_out = {};
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float A = a.v[j], by = scale ? s.v[j] : 1.f;
      const float r = exp_f(level == ratio_level::TOKEN ? lp.v[j] - b.v[j] : seq_l);
      // c, its derivative by log r (which may belong to the sequence) and its derivative by logp_t alone
      float c = 0.f, dc_r = 0.f, dc_t = 0.f, shown = r, side = 0.f;
      if (D == policy_term::CLIP) {
        const float r1 = min2(r, delta), r2 = clamp_f(r, 1.f - low, 1.f + high);
        const float f1 = r1 * A, f2 = r2 * A;
        const float g1 = r <= delta ? A : 0.f, g2 = r >= 1.f - low && r <= 1.f + high ? A : 0.f;
        c = -min2(f1, f2);
        dc_r = -r * (f1 < f2 ? g1 : f1 > f2 ? g2 : 0.5f * (g1 + g2));
        side = r1 < 1.f - low && A < 0.f ? 1.f : r1 > 1.f + high && A > 0.f ? 2.f : 0.f;
      } else if (D == policy_term::CISPO) {
        const float held = min2(r, high);
        c = -held * A * lp.v[j];
        dc_t = -held * A;
        side = r > high && A > 0.f ? 2.f : 0.f;
      } else if (D == policy_term::SAPO) {
        const float tau = A > 0.f ? pos_a : neg_a, g = sigmoid_f(tau * (r - 1.f));
        c = -g * (4.f / tau) * A;
        dc_r = -4.f * g * (1.f - g) * A * r;
      } else {
        const float k = A >= 0.f ? pos_a : neg_a, lambda = max2(A >= 0.f ? pos_b : neg_b, 1e-4f);
        const float phi = exp_f(lambda + k * log_w - lambda * exp_f(log_w));
        c = -phi * A * lp.v[j];
        dc_t = -phi * A;
        shown = phi;
      }
      float v = by * c, d_r = by * dc_r, d_t = by * dc_t, div = 0.f;
      if (ref_logp) {
        const float x = rf.v[j] - lp.v[j], k = k3(x), dk = -(k + x);  // d k3 / d logp = 1 - e^x
        div = bias_correction ? k * r : k;
        v = fmaf(beta, div, v);
        d_t = fmaf(beta, bias_correction ? dk * r : dk, d_t);
        d_r = fmaf(beta, bias_correction ? div : 0.f, d_r);
      }
      const bool in = w.v[j] != 0.f;  // masked tokens may hold any value, NaN included
      total.v[j] = in ? fmaf(w.v[j], v, total.v[j]) : total.v[j];
      own.v[j] = in ? w.v[j] * (level == ratio_level::TOKEN ? d_t + d_r : d_t) : 0.f;
      shared.v[j] = in ? fmaf(w.v[j], d_r, shared.v[j]) : shared.v[j];
      r_out.v[j] = shown;
      kl_out.v[j] = div;
      clip_out.v[j] = side;
    }
    store(dlogp + at + i, own, n - i);
    store(ratio + at + i, r_out, n - i);
    store(kl + at + i, kl_out, n - i);
    store(clip + at + i, clip_out, n - i);
  }
  const float loss = pack_sum(total);
  if (LANE == 0) seq_loss[seq] = loss;
  if (level == ratio_level::TOKEN) return;
  const float share = pack_sum(shared) / count;
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack w = load_row(weight + at, i, n), g = load_row(dlogp + at, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) g.v[j] += w.v[j] != 0.f ? share : 0.f;
    store(dlogp + at + i, g, n - i);
  }
}

// out[0] = the sum of x, by one warp in a fixed order.
KERNEL_WARP(sum_all)(float* out, const float* x, int n) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack v = load_row(x, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  const float s = pack_sum(acc);
  if (LANE == 0) out[0] = s;
}

// dx (+)= upstream[0] saved
KERNEL_FLAT(scale_by_upstream)(float* dx, const float* saved, const float* upstream, long long n, int accumulate) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  const float up = upstream[0];
  FlatPack p = load<V>(saved + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] *= up;
  store(dx + i, p, n - i, accumulate);
}

// part [chunks of 1024]: sums of the loss; clip [n]: 1 where the clipped error is the larger; dvalue [n]: the gradient.
KERNEL_WARP(value_loss)(float* part, float* clip, float* dvalue, const float* value, const float* old, const float* returns,
                        const float* weight, int n, float range) {
  const long long chunk = WARP_INDEX, at = chunk * VALUE_CHUNK;
  if (at >= n) return;
  const int count = n - at < VALUE_CHUNK ? (int)(n - at) : VALUE_CHUNK;
  WarpPack total = {};
  for (int i = WCOL; i < count; i += WARP_STEP) {
    WarpPack v = load_row(value + at, i, count), o = load_row(old + at, i, count);
    WarpPack r = load_row(returns + at, i, count), w = load_row(weight + at, i, count), c = {};
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float low = o.v[j] - range, high = o.v[j] + range;
      const float e1 = v.v[j] - r.v[j], e2 = clamp_f(v.v[j], low, high) - r.v[j];
      const float f1 = e1 * e1, f2 = e2 * e2, g2 = v.v[j] >= low && v.v[j] <= high ? e2 : 0.f;
      const bool in = w.v[j] != 0.f;
      total.v[j] = in ? fmaf(0.5f * w.v[j], max2(f1, f2), total.v[j]) : total.v[j];
      c.v[j] = f2 > f1 ? 1.f : 0.f;
      v.v[j] = in ? w.v[j] * (f1 > f2 ? e1 : f2 > f1 ? g2 : 0.5f * (e1 + g2)) : 0.f;
    }
    store(dvalue + at + i, v, count - i);
    store(clip + at + i, c, count - i);
  }
  const float loss = pack_sum(total);
  if (LANE == 0) part[chunk] = loss;
}

KERNEL_FLAT(gae)(float* advantage, float* returns, const float* reward, const float* value, const int* starts, int sequences,
                 float gamma, float lam) {
  const long long seq = FLAT_INDEX;
  if (seq >= sequences) return;
  float next_value = 0.f, next = 0.f;
  for (int t = starts[seq + 1] - 1; t >= starts[seq]; --t) {
    const float v = value[t];
    next = reward[t] + gamma * next_value - v + gamma * lam * next;
    advantage[t] = next;
    returns[t] = next + v;
    next_value = v;
  }
}

// moments [3]: count, mean, variance (with Bessel's correction) of x where mask is not 0. One warp.
KERNEL_WARP(masked_moments)(float* moments, const float* x, const float* mask, int n) {
  if (WARP_INDEX > 0) return;
  WarpPack sum = {}, tokens = {}, square = {};
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack v = load_row(x, i, n), m = load_row(mask, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const bool in = m.v[j] != 0.f;
      sum.v[j] += in ? v.v[j] : 0.f;
      tokens.v[j] += in ? 1.f : 0.f;
    }
  }
  const float count = pack_sum(tokens), mean = pack_sum(sum) / max2(count, 1.f);
  for (int i = WCOL; i < n; i += WARP_STEP) {
    WarpPack v = load_row(x, i, n), m = load_row(mask, i, n);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      const float d = m.v[j] != 0.f ? v.v[j] - mean : 0.f;
      square.v[j] = fmaf(d, d, square.v[j]);
    }
  }
  const float variance = pack_sum(square) / max2(count - 1.f, 1.f);
  if (LANE == 0) {
    moments[0] = count;
    moments[1] = mean;
    moments[2] = variance;
  }
}

KERNEL_FLAT(whiten)(float* y, const float* x, const float* mask, const float* moments, long long n, int shift) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  const float mean = moments[1], by = 1.f / sqrtf(moments[2] + 1e-8f), add = shift ? 0.f : mean;
  FlatPack p = load<V>(x + i, n - i), m = load<V>(mask + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] = m.v[j] != 0.f ? (p.v[j] - mean) * by + add : 0.f;
  store(y + i, p, n - i);
}
