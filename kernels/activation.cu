// Activations: gated (SwiGLU and its gelu siblings) and plain.
//
// Math     gated: y = act(g) * u for the halves g|u of a row;  dg = dy u act'(g), du = dy act(g)
//          plain: y = act(x);  dx = dy act'(x)
//          act (D): 0 silu x S(x); 1 gelu by tanh, x/2 (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))); 2 gelu x/2 (1 + erf(x/sqrt 2));
//          3 relu max(x, 0), with derivative 0 at 0
//          (Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks & Gimpel, GELU, 2016)
// Shapes   gated: x [rows, 2 f] real, y [rows, f];  plain: flat n
// Plan     a thread owns V values.
// Numerics float, one rounding when stored.
// Cost     6 f (forward), 10 f (backward) x sizeof(real) / 2 bytes a row. GPU: not measured yet.
#include "prim/math.cuh"
#include "prim/vec.cuh"

// The activations, D of the kernels.
EXPORT_ENUM(act, SILU, GELU_TANH, GELU, RELU);

// value and derivative
template <int ACT>
DEVICE void activate(float x, float& y, float& dy) {
  if (ACT == act::SILU) {
    const float s = sigmoid_f(x);
    y = x * s;
    dy = s * fmaf(x, 1.f - s, 1.f);
  } else if (ACT == act::GELU_TANH) {
    const float k = 0.7978845608028654f, c = 0.044715f;
    const float t = tanh_f(k * fmaf(c * x * x, x, x));
    y = 0.5f * x * (1.f + t);
    dy = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * k * fmaf(3.f * c * x, x, 1.f);
  } else if (ACT == act::RELU) {
    y = x > 0.f ? x : 0.f;
    dy = x > 0.f ? 1.f : 0.f;
  } else {
    const float e = 0.5f * (1.f + erf_f(x * 0.7071067811865476f));
    y = x * e;
    dy = fmaf(x * 0.3989422804014327f, exp_f(-0.5f * x * x), e);
  }
}

KERNEL_FLAT(glu_fwd, D=0,1,2)(real* y, const real* x, int rows, int f) {
  const int packs = (f + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)rows * packs) return;
  const long long row = item / packs;
  const int i = (int)(item % packs) * V, n = f - i;
  FlatPack g = load<V>(x + row * 2 * f + i, n), u = load<V>(x + row * 2 * f + f + i, n);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float a, da;
    activate<D>(g.v[j], a, da);
    g.v[j] = a * u.v[j];
  }
  store(y + row * f + i, g, n);
}

KERNEL_FLAT(glu_bwd, D=0,1,2)(real* dx, const real* dy, const real* x, int rows, int f, int accumulate) {
  const int packs = (f + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)rows * packs) return;
  const long long row = item / packs;
  const int i = (int)(item % packs) * V, n = f - i;
  FlatPack g = load<V>(x + row * 2 * f + i, n), u = load<V>(x + row * 2 * f + f + i, n), d = load<V>(dy + row * f + i, n);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float a, da;
    activate<D>(g.v[j], a, da);
    g.v[j] = d.v[j] * u.v[j] * da;
    u.v[j] = d.v[j] * a;
  }
  store(dx + row * 2 * f + i, g, n, accumulate);
  store(dx + row * 2 * f + f + i, u, n, accumulate);
}

KERNEL_FLAT(act_fwd, D=0,1,2,3)(real* y, const real* x, long long n) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float a, da;
    activate<D>(p.v[j], a, da);
    p.v[j] = a;
  }
  store(y + i, p, n - i);
}

KERNEL_FLAT(act_bwd, D=0,1,2,3)(real* dx, const real* dy, const real* x, long long n, int accumulate) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i), d = load<V>(dy + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float a, da;
    activate<D>(p.v[j], a, da);
    p.v[j] = d.v[j] * da;
  }
  store(dx + i, p, n - i, accumulate);
}
