// Activations and their derivatives, for the kernels of activation.cu and for products with an activation in the epilogue.
#pragma once
#include "prim/math.cuh"

// The activations, D of the kernels of activation.cu.
EXPORT_ENUM(act, SILU, GELU_TANH, GELU, RELU);

// The same bits as sigmoid_f (all 2^32 floats were compared on an H100). Numerator and denominator lie in [0, 1] and [1, 2], so
// on a GPU the quotient needs none of the range checks of a division, whose branches keep the elements of a pack from
// overlapping.
DEVICE float gate_sigmoid(float x) {
#ifdef __CUDACC__
  const float e = exp_f(x < 0.f ? x : -x), n = x < 0.f ? e : 1.f, d = 1.f + e;
  float r = __fdividef(1.f, d);
  r = fmaf(fmaf(-d, r, 1.f), r, r);
  float q = n * r;
  q = fmaf(fmaf(-d, q, n), r, q);
  return fmaf(fmaf(-d, q, n), r, q);
#else
  return sigmoid_f(x);
#endif
}

// Value and derivative.
template <int ACT>
DEVICE void activate(float x, float& y, float& dy) {
  if (ACT == act::SILU) {
    const float s = gate_sigmoid(x);
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

// y of a gated unit from g and u after both are rounded to storage: the value that the glu kernels compute.
DEVICE float gated(int activation, float g, float u) {
  float y, dy;
  if (activation == act::SILU) activate<act::SILU>(g, y, dy);
  else if (activation == act::GELU_TANH) activate<act::GELU_TANH>(g, y, dy);
  else activate<act::GELU>(g, y, dy);
  return y * u;
}
