// AdamW, the global gradient norm, and clipping by it.
//
// Math     c = min(1, max_norm / (|g| + 1e-6)) (max_norm 0: c = 1);  g' = c g
//          m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2
//          p = p (1 - lr wd) - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//          (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019; the order of operations is PyTorch's)
// Shapes   p, m, v, g flat n float; w flat n real, the weights that kernels read
//          hyper [8] float on the device: lr (times lr_scale, the group's), 1 - b1^t, sqrt(1 - b2^t), norm, clip factor; key as in dropout.cu
// Plan     norm: a warp sums 8192 squares, one warp sums the partials. Update: a thread owns V values.
// Numerics float. D=0: a float master p, w is p rounded to nearest. D=1: no master; w itself is the parameter and is
//          rounded stochastically, up with the probability of the dropped fraction (Philox by index and step, so the
//          result does not depend on the layout of the launch).
// Cost     D=0: 28 n + sizeof(real) n bytes; D=1: 20 n + 2 sizeof(real) n. GPU: not measured yet.
#include "prim/math.cuh"
#include "prim/rng.cuh"
#include "prim/warp.cuh"

constexpr int NORM_CHUNK = 8192;

KERNEL_WARP(square_sums)(float* partial, const float* g, long long n) {
  const long long chunk = WARP_INDEX, start = chunk * NORM_CHUNK;
  if (start >= n) return;
  const int count = (int)(n - start < NORM_CHUNK ? n - start : NORM_CHUNK);
  WarpPack acc = {};
  for (int i = WCOL; i < count; i += WARP_STEP) {
    WarpPack v = load_row(g + start, i, count);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(v.v[j], v.v[j], acc.v[j]);
  }
  const float s = pack_sum(acc);
  if (LANE == 0) partial[chunk] = s;
}

// hyper[3] = the norm, hyper[4] = the clip factor. One warp.
KERNEL_WARP(norm_and_clip)(INOUT(float) hyper, const float* partial, int chunks, float max_norm) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < chunks; i += WARP_STEP) {
    WarpPack v = load_row(partial, i, chunks);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  const float norm = sqrtf(pack_sum(acc));
  if (LANE == 0) {
    const float c = max_norm / (norm + 1e-6f);
    hyper[3] = norm;
    hyper[4] = max_norm > 0.f && c < 1.f ? c : 1.f;
  }
}

KERNEL_FLAT(adamw, D=0,1)(MAYBE(float) p, INOUT(real) w, INOUT(float) m, INOUT(float) v, const float* g, const float* hyper,
                          const int* key, long long n, float beta1, float beta2, float eps, float weight_decay,
                          float lr_scale, int group) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  const float lr = hyper[0] * lr_scale, correction1 = hyper[1], correction2 = hyper[2], clip = hyper[4];
  const float step = lr / correction1, keep = 1.f - lr * weight_decay;
  FlatPack x = D == 0 ? load<V>(p + i, n - i) : load<V>(w + i, n - i);
  FlatPack a = load<V>(m + i, n - i), b = load<V>(v + i, n - i), d = load<V>(g + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float e = d.v[j] * clip;
    a.v[j] = fmaf(beta1, a.v[j], (1.f - beta1) * e);
    b.v[j] = fmaf(beta2, b.v[j], (1.f - beta2) * e * e);
    x.v[j] = fmaf(-step, a.v[j] / (sqrtf(b.v[j]) / correction2 + eps), x.v[j] * keep);
  }
  store(m + i, a, n - i);
  store(v + i, b, n - i);
  if (D == 0) {
    store(p + i, x, n - i);
    store(w + i, x, n - i);
    return;
  }
  // Adding a uniform 16-bit number below the kept bits and cutting rounds up with the right probability.
  const long long first = i / 8 * 8;  // 16 bits a value: one Philox call serves the 8 values of an aligned group
  const Philox r = philox((unsigned)key[0], (unsigned)key[1], (unsigned)(first / 8), (unsigned)key[2], (unsigned)group, 0x02000000u);
  const unsigned words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int k = (int)(i - first) + j;
    const unsigned noise = words[k / 2] >> (k % 2 * 16) & 0xffffu;
    const unsigned bits = (unsigned)float_to_bits(x.v[j]);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    x.v[j] = sizeof(real) == 2 && finite ? bits_to_float((int)((bits + noise) & 0xffff0000u)) : x.v[j];
  }
  store(w + i, x, n - i);
}
