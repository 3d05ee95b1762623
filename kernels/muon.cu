// Muon: momentum, orthogonalisation of a matrix by Newton-Schulz steps, and the update.
//
// Math     m = m + (1 - mu) (c g - m);  u = g' + mu (m - g') with g' = c g (no Nesterov: u = m);  c the clip factor
//          X = u / max(|u|_F, 1e-7);  five times: A = X X^T, B = b A + c A A, X = a X + B X, (a, b, c) = (3.4445, -4.7750,
//          2.0315)
//          p = p (1 - lr wd) - lr s X, s by the shape: sqrt(max(1, rows / cols)) or 0.2 sqrt(max(rows, cols))
//          A matrix with more rows than columns takes A = X^T X and X = a X + X B: the same, without a transpose.
//          (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
//          Training", 2025; the order of operations is that of torch.optim.Muon, torch 2.11)
// Shapes   p, m, g [rows, cols] float;  w as p, but real: the weights that kernels read;  X [rows, cols] and A [side, side] real,
//          side = min(rows, cols);  A A and B X float;  hyper [8] float on the device, as in adamw.cu
// Plan     Element-wise kernels: one thread per V values. Norm: a warp sums 8192 squares, one warp sums the partials. The
//          products are those of matmul.cu and matmul_hopper.cu.
// Numerics X and A are rounded to `real` when stored: float in a float run (torch casts to bf16), bf16 in a bf16 run, as in
//          torch. Products are float sums, and a A + b (A A) is rounded once. Momentum and update are float.
// Cost     For an r x c matrix with s = min(r, c): 10 s r c (1 + s / (2 max(r, c))) flops in 15 products; 16 r c bytes for
//          momentum and update, and about 20 + 12 sizeof(real) bytes per element and Newton-Schulz step. *Predicted*, not
//          measured on a GPU.
#include "prim/warp.cuh"

// Squares that one warp sums.
EXPORT(int, MUON_CHUNK, 8192);

// a + w (b - a), with torch's rounding.
DEVICE float lerp(float a, float b, float w) {
  return w < 0.5f ? a + w * (b - a) : b - (b - a) * (1.f - w);
}

// Updates the momentum and writes the matrix to orthogonalise to x.
KERNEL_FLAT(muon_momentum)(INOUT(float) m, real* x, const float* g, const float* hyper, long long n, float momentum,
                           int nesterov) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack a = load<V>(m + i, n - i), d = load<V>(g + i, n - i), u;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float e = d.v[j] * hyper[4];
    a.v[j] = lerp(a.v[j], e, 1.f - momentum);
    u.v[j] = nesterov ? lerp(e, a.v[j], momentum) : a.v[j];
  }
  store(m + i, a, n - i);
  store(x + i, u, n - i);
}

KERNEL_WARP(muon_squares)(float* partial, const real* x, long long n) {
  const long long chunk = WARP_INDEX, start = chunk * MUON_CHUNK;
  if (start >= n) return;
  const int count = (int)(n - start < MUON_CHUNK ? n - start : MUON_CHUNK);
  WarpPack acc = {};
  for (int i = WCOL; i < count; i += WARP_STEP) {
    WarpPack v = load_row(x + start, i, count);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(v.v[j], v.v[j], acc.v[j]);
  }
  const float s = pack_sum(acc);
  if (LANE == 0) partial[chunk] = s;
}

// norm[0] = max(norm, eps). One warp.
KERNEL_WARP(muon_norm)(float* norm, const float* partial, int chunks, float eps) {
  if (WARP_INDEX > 0) return;
  WarpPack acc = {};
  for (int i = WCOL; i < chunks; i += WARP_STEP) {
    WarpPack v = load_row(partial, i, chunks);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] += v.v[j];
  }
  const float s = sqrtf(pack_sum(acc));
  if (LANE == 0) norm[0] = s > eps ? s : eps;
}

KERNEL_FLAT(muon_divide)(INOUT(real) x, const float* norm, long long n) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] /= norm[0];
  store(x + i, p, n - i);
}

// x = a x + b s
KERNEL_FLAT(muon_blend)(INOUT(real) x, const float* s, float a, float b, long long n) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i), q = load<V>(s + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] = fmaf(b, q.v[j], a * p.v[j]);
  store(x + i, p, n - i);
}

// In a float build w and p are the same buffer.
KERNEL_FLAT(muon_update)(INOUT(float) p, INOUT(real) w, const real* x, const float* hyper, long long n, float weight_decay,
                         float lr_scale, float adjust) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  const float lr = hyper[0] * lr_scale, keep = 1.f - lr * weight_decay, step = lr * adjust;
  FlatPack a = load<V>(p + i, n - i), o = load<V>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) a.v[j] = fmaf(-step, o.v[j], a.v[j] * keep);
  store(p + i, a, n - i);
  store(w + i, a, n - i);
}
