// Activations: gated (SwiGLU and its gelu siblings) and plain.
//
// Math     gated: y = act(g) * u for the halves g|u of a row;  dg = dy u act'(g), du = dy act(g)
//          plain: y = act(x);  dx = dy act'(x)
//          act (D): 0 silu x S(x); 1 gelu by tanh, x/2 (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))); 2 gelu x/2 (1 + erf(x/sqrt 2));
//          3 relu max(x, 0), with derivative 0 at 0
//          (Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks & Gimpel, GELU, 2016)
// Shapes   gated: x [rows, 2 f] real, y [rows, f];  plain: flat n
// Plan     One thread per V values (gated, on a CPU: every fourth thread takes 4 V). The gated kernels are limited by memory and
//          arithmetic alike, so on a GPU whole packs take a path without branches.
// Numerics float, rounded once when stored.
// Cost     6 f (forward), 10 f (backward) x sizeof(real) / 2 bytes a row. H100, 2026-11-27, bf16 silu, 16,384 x 4,864: forward
//          174.7 us, 95% of copy speed (190.9 with the branches), backward 267.7 us, 103% (296.4).
#include "common/activate.cuh"
#include "prim/vec.cuh"

// Packs per thread of a gated kernel. A CPU's vectors are longer than a GPU's packs: if a row is a whole number of fours of
// packs, every fourth CPU thread takes the four packs from its own on, and the other threads none.
constexpr int GATED_PACKS = LANES == 1 ? 4 : 1;
DEVICE bool by_fours(int f) { return GATED_PACKS > 1 && f % (GATED_PACKS * V) == 0; }

// n values of a pack. WHOLE: all N, in one aligned load that stalls only at its first use.
template <bool WHOLE, int N>
DEVICE Pack<N> gate_pack(const real* p, int n) {
  return WHOLE ? values(fetch<N>(p, N)) : load<N>(p, n);
}

template <int D, bool WHOLE, int N = V>
DEVICE void glu_pack(real* y, const real* x, int f, int n) {
  Pack<N> g = gate_pack<WHOLE, N>(x, n), u = gate_pack<WHOLE, N>(x + f, n);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float a, da;
    activate<D>(g.v[j], a, da);
    g.v[j] = a * u.v[j];
  }
  if (WHOLE) put(y, packed<real>(g), N);
  else store(y, g, n);
}

KERNEL_FLAT(glu_fwd, D=0,1,2)(real* y, const real* x, int rows, int f) {
  const int packs = (f + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)rows * packs) return;
  const bool fours = by_fours(f);
  if (fours && item % GATED_PACKS) return;
  const long long row = item / packs;
  const int i = (int)(item % packs) * V;
  if (fours) return glu_pack<D, false, GATED_PACKS * V>(y + row * f + i, x + row * 2 * f + i, f, f - i);
  // The path of whole packs is for GPUs only: a CPU's threads are lanes of its vectors and gain nothing from it.
  if (LANES > 1 && whole_packs(x, f) && whole_packs(y, 0))
    glu_pack<D, true>(y + row * f + i, x + row * 2 * f + i, f, f - i);
  else
    glu_pack<D, false>(y + row * f + i, x + row * 2 * f + i, f, f - i);
}

template <int D, bool WHOLE, int N = V>
DEVICE void glu_bwd_pack(real* dx, const real* dy, const real* x, int f, int n, int accumulate) {
  Pack<N> g = gate_pack<WHOLE, N>(x, n), u = gate_pack<WHOLE, N>(x + f, n), d = gate_pack<WHOLE, N>(dy, n);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float a, da;
    activate<D>(g.v[j], a, da);
    g.v[j] = d.v[j] * u.v[j] * da;
    u.v[j] = d.v[j] * a;
  }
  if (WHOLE && !accumulate) {
    put(dx, packed<real>(g), N);
    put(dx + f, packed<real>(u), N);
  } else {
    store(dx, g, n, accumulate);
    store(dx + f, u, n, accumulate);
  }
}

KERNEL_FLAT(glu_bwd, D=0,1,2)(real* dx, const real* dy, const real* x, int rows, int f, int accumulate) {
  const int packs = (f + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)rows * packs) return;
  const bool fours = by_fours(f);
  if (fours && item % GATED_PACKS) return;
  const long long row = item / packs;
  const int i = (int)(item % packs) * V;
  if (fours)
    return glu_bwd_pack<D, false, GATED_PACKS * V>(dx + row * 2 * f + i, dy + row * f + i, x + row * 2 * f + i, f, f - i,
                                                   accumulate);
  if (LANES > 1 && whole_packs(x, f) && whole_packs(dy, 0) && whole_packs(dx, 0))
    glu_bwd_pack<D, true>(dx + row * 2 * f + i, dy + row * f + i, x + row * 2 * f + i, f, f - i, accumulate);
  else
    glu_bwd_pack<D, false>(dx + row * 2 * f + i, dy + row * f + i, x + row * 2 * f + i, f, f - i, accumulate);
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
