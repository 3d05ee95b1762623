// The rotation of a head and the norm before it, by packs of pairs. rope.cu has the math; training, prefill and decoding all call
// this, so they have the same bits.
#pragma once
#include "common/norm.cuh"

// A pack of half a head; `n` values are left from its start. WHOLE: one aligned load, which stalls only at its first use.
template <bool WHOLE, class T>
DEVICE FlatPack half_pack(const T* p, int n) {
  return WHOLE ? values(fetch<V>(p, n)) : load<V>(p, n);
}

// The pairs of a head in one pack: values a + j and b + j of the head, j < n. `angle` is the index of the first angle; -1: not
// rotated.
struct HeadPairs {
  int a, b, n, angle;
};
template <bool MORE>
DEVICE HeadPairs head_pairs(int pack, int dim, int turned) {
  if (!MORE) turned = dim;
  const int half = turned / 2, packs = (half + V - 1) / V, i = pack * V;
  if (!MORE || pack < packs) return {i, i + half, half - i, i};
  const int rest = (dim - turned) / 2, j = (pack - packs) * V;
  return {turned + j, turned + j + rest, rest - j, -1};
}
template <bool MORE>
DEVICE int packs_of_head(int dim, int turned) {
  if (!MORE) return (dim / 2 + V - 1) / V;
  return (turned / 2 + V - 1) / V + ((dim - turned) / 2 + V - 1) / V;
}

// Norm of a pack of pairs (a, b) of a head.
template <bool WHOLE = false>
DEVICE void norm_pairs(FlatPack& a, FlatPack& b, const real* w, const HeadPairs& at, float rstd, float plus, int once) {
  FlatPack wa = half_pack<WHOLE>(w + at.a, at.n), wb = half_pack<WHOLE>(w + at.b, at.n);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    a.v[j] = round_real(weighted(a.v[j] * rstd, wa.v[j], plus, once));
    b.v[j] = round_real(weighted(b.v[j] * rstd, wb.v[j], plus, once));
  }
}

// Rotates a pack of pairs by the angles with cosines c and sines s.
DEVICE void rotate(FlatPack& a, FlatPack& b, const FlatPack& c, const FlatPack& s, float sign) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float first = fmaf(a.v[j], c.v[j], -(b.v[j] * s.v[j] * sign));
    b.v[j] = fmaf(b.v[j], c.v[j], a.v[j] * s.v[j] * sign);
    a.v[j] = first;
  }
}
