// AdamW, the global gradient norm, and clipping by it.
//
// Math     c = min(1, max_norm / (|g| + 1e-6)) (max_norm 0: c = 1);  g' = c g
//          m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2
//          p = p (1 - lr wd) - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//          (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019; the order of operations is PyTorch's)
// Shapes   p, m, v, g flat n float (adamw_bf16: m, v bf16);  w flat n real, the weights that kernels read;
//          hyper [8] float on the device: lr (lr_scale, the parameter group's factor, multiplies it), 1 - b1^t, sqrt(1 - b2^t),
//          norm, clip factor;  key as in dropout.cu
// Plan     Norm: a warp sums 8192 squares, one warp sums the partials. Update: one thread per V values.
// Numerics float. D=0: a float master p, and w is p rounded to nearest. D=1: no master; w itself is the parameter and is rounded
//          stochastically, up with the probability of the dropped fraction (Philox by index and step, so the result does not
//          depend on the launch configuration). bf16 moments are rounded stochastically too, after the step has used them
//          unrounded: with rounding to nearest, a v that changes by 1/1000 of itself would never change.
// Cost     D=0: 28 n + sizeof(real) n bytes; D=1: 20 n + 2 sizeof(real) n; 8 n less with moments in bf16. H100, 494 M parameters,
//          2026-11-27: adamw<0> 5.0 ms, at copy speed; square_sums 0.66 ms, at copy speed; norm_and_clip, where one warp walks
//          through 60,000 partial sums, 36 us (107 us with one load at a time).
#include "common/adam.cuh"
#include "prim/warp.cuh"

// Squares that one warp sums.
EXPORT(int, NORM_CHUNK, 8192);
// Packs that a lane of norm_and_clip loads at once. (On a CPU, with one lane per warp, this would only add copies.)
constexpr int AHEAD = 4;
// Values per thread of adamw_bf16.
EXPORT(int, ADAMW_BF16_PACK, 8);

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
KERNEL_WARP(norm_and_clip, BLOCKS=0:4)(INOUT(float) hyper, const float* partial, int chunks, float max_norm) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  int i = WCOL;
  if (LANES > 1 && whole_packs(partial, 0)) {
    for (; i - WCOL + AHEAD * WARP_STEP <= chunks; i += AHEAD * WARP_STEP) {
      Packed<WV, float> p[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) p[k] = fetch<WV>(partial + i + k * WARP_STEP, WV);
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        const WarpPack v = values(p[k]);
#pragma unroll
        for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
      }
    }
  }
  for (; i < chunks; i += WARP_STEP) {
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
  const AdamStep adam(hyper, beta1, beta2, eps, weight_decay, lr_scale);
  FlatPack x = D == 0 ? load<V>(p + i, n - i) : load<V>(w + i, n - i);
  FlatPack a = load<V>(m + i, n - i), b = load<V>(v + i, n - i), d = load<V>(g + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) adam.apply(x.v[j], a.v[j], b.v[j], d.v[j]);
  store(m + i, a, n - i);
  store(v + i, b, n - i);
  if (D == 0) store(p + i, x, n - i);
  if (D == 1 && sizeof(real) == 2) round_by_chance(x, key, i, group, WEIGHT_NOISE_TAG);
  store(w + i, x, n - i);
}

// adamw with moments in bf16.
KERNEL_FLAT(adamw_bf16, D=0,1)(MAYBE(float) p, INOUT(real) w, INOUT(bf16) m, INOUT(bf16) v, const float* g,
                               const float* hyper, const int* key, long long n, float beta1, float beta2, float eps,
                               float weight_decay, float lr_scale, int group) {
  const long long i = FLAT_INDEX * ADAMW_BF16_PACK;
  if (i >= n) return;
  const AdamStep adam(hyper, beta1, beta2, eps, weight_decay, lr_scale);
  Pack<ADAMW_BF16_PACK> x = D == 0 ? load<ADAMW_BF16_PACK>(p + i, n - i) : load<ADAMW_BF16_PACK>(w + i, n - i);
  Pack<ADAMW_BF16_PACK> a = load<ADAMW_BF16_PACK>(m + i, n - i), b = load<ADAMW_BF16_PACK>(v + i, n - i), d = load<ADAMW_BF16_PACK>(g + i, n - i);
#pragma unroll
  for (int j = 0; j < ADAMW_BF16_PACK; ++j) adam.apply(x.v[j], a.v[j], b.v[j], d.v[j]);
  round_by_chance(a, key, i, group, M_NOISE_TAG);
  round_by_chance(b, key, i, group, V_NOISE_TAG);
  store(m + i, a, n - i);
  store(v + i, b, n - i);
  if (D == 0) store(p + i, x, n - i);
  if (D == 1 && sizeof(real) == 2) round_by_chance(x, key, i, group, WEIGHT_NOISE_TAG);
  store(w + i, x, n - i);
}
