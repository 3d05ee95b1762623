// Our own exp, log, tanh and erf: the same source gives the same result on every device, and the host compiler can vectorise
// them. Accuracy, measured against f64 over all binades (tests/it/prim.rs enforces it): exp 1.1 ulp, log 0.9 ulp, tanh 1.4 ulp,
// sigmoid 2.5 ulp, erf 2e-7 absolute and for |x| < 1 2.1 ulp. The sign of a zero is not kept.
#pragma once
#include "prim/kernel.cuh"

DEVICE float bits_to_float(int i) {
#ifdef __CUDACC__
  return __int_as_float(i);
#else
  return shim::as_float((unsigned)i);
#endif
}
DEVICE int float_to_bits(float f) {
#ifdef __CUDACC__
  return __float_as_int(f);
#else
  return (int)shim::as_bits(f);
#endif
}
DEVICE float max2(float a, float b) { return a > b ? a : b; }  // a plain select: vectorises, unlike fmaxf's NaN rule
DEVICE float min2(float a, float b) { return a < b ? a : b; }

constexpr float NEG_INF = -__builtin_huge_valf();

// e^x = 2^n p with x = n ln2 + r, |r| <= ln2/2. Returns p = e^r by a degree-6 polynomial, and in `shifted` n + 12582912, whose
// low bits hold the integer n (rounded to nearest even). For |x| below 2^21.
DEVICE float exp_parts(float x, float& shifted) {
  shifted = fmaf(x, 1.44269504f, 12582912.f);
  const float n = shifted - 12582912.f;
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.98756850e-4f;
  p = fmaf(p, r, 1.39819994e-3f);
  p = fmaf(p, r, 8.33345205e-3f);
  p = fmaf(p, r, 4.16657962e-2f);
  p = fmaf(p, r, 1.66666657e-1f);
  p = fmaf(p, r, 0.5f);
  return fmaf(p * r, r, r) + 1.f;
}

// e^x. 2^n is applied in two factors so that denormal results are reached. Below -104 it is 0, above 88.73 infinity; NaN stays
// NaN.
DEVICE float exp_f(float x) {
  float shifted;
  const float p = exp_parts(min2(max2(x, -104.f), 89.f), shifted);
  const int k = (int)(shifted - 12582912.f), half = k >> 1;
  const float y = p * bits_to_float((half + 127) << 23) * bits_to_float((k - half + 127) << 23);
  return x == x ? y : x;
}

// The same bits as exp_f, for x from -86 to 0 or slightly above: no denormals, no overflow, no conversion to an integer. NaN
// stays NaN.
DEVICE float exp_down(float x) {
  float shifted;
  const float p = exp_parts(x, shifted);
  return p * bits_to_float((int)(((unsigned)float_to_bits(shifted) << 23) + 0x3f800000u));
}

// 2^x, for a softmax in base 2: 2 ulp. Below -126 it is 0 (no denormals), above 127 it is 2^127; NaN stays NaN.
DEVICE float exp2_f(float x) {
  float c = min2(127.f, max2(-126.f, x));
  float n = c + 12582912.f;  // round to nearest even: the integer is in the low bits
  float f = c - (n - 12582912.f);
  float p = 1.32186723e-3f;
  p = fmaf(p, f, 9.67169832e-3f);
  p = fmaf(p, f, 5.55089302e-2f);
  p = fmaf(p, f, 2.40222380e-1f);
  p = fmaf(p, f, 6.93146884e-1f);
  p = fmaf(p, f, 1.f);
  float y = p * bits_to_float((int)((unsigned)float_to_bits(n) - 0x4b400000u + 127u) << 23);
  return x < -126.f ? 0.f : y;
}

// 2^x where speed matters most, for all tensor-core kernels of attention: 2 ulp, and 0 below -126. On a GPU it is one
// instruction, on a CPU exp2_f: they differ in the last bits, and above 127 the GPU gives infinity.
DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2_f(x);
#endif
}

// The larger of two, in one instruction on a GPU; max2 takes two there because of its rule for NaN.
DEVICE float max_fast(float a, float b) {
#ifdef __CUDACC__
  return fmaxf(a, b);
#else
  return max2(a, b);
#endif
}

// log x for x > 0; log 0 = -inf; NaN for x < 0 or NaN.
DEVICE float log_f(float x) {
  bool tiny = x < 1.17549435e-38f;
  float s = tiny ? x * 8388608.f : x;
  int i = float_to_bits(s);
  int e = (i - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  float m = bits_to_float(i - (e << 23)) - 1.f;
  float n = (float)(tiny ? e - 23 : e);
  float z = m * m;
  float p = 7.0376836292e-2f;
  p = fmaf(p, m, -1.1514610310e-1f);
  p = fmaf(p, m, 1.1676998740e-1f);
  p = fmaf(p, m, -1.2420140846e-1f);
  p = fmaf(p, m, 1.4249322787e-1f);
  p = fmaf(p, m, -1.6668057665e-1f);
  p = fmaf(p, m, 2.0000714765e-1f);
  p = fmaf(p, m, -2.4999993993e-1f);
  p = fmaf(p, m, 3.3333331174e-1f);
  float y = p * m * z;
  y = fmaf(n, -2.12194440e-4f, y);
  y = fmaf(-0.5f, z, y);
  y = fmaf(n, 0.693359375f, m + y);
  y = x == 0.f ? NEG_INF : y;
  y = x == -NEG_INF ? x : y;
  return x >= 0.f ? y : x - x + bits_to_float(0x7fc00000);
}

// 1 / (1 + e^-x), through e^-|x|: nothing overflows, and the small values of negative x keep their precision.
DEVICE float sigmoid_f(float x) {
  float e = exp_f(x < 0.f ? x : -x);
  return (x < 0.f ? e : 1.f) / (1.f + e);
}

// tanh through e^2|x|; near 0, where that cancels, by an odd polynomial.
DEVICE float tanh_f(float x) {
  float a = x < 0.f ? -x : x;
  float z = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  float small = fmaf(p * z, x, x);
  float big = 1.f - 2.f / (exp_f(2.f * a) + 1.f);
  big = x < 0.f ? -big : big;
  return a < 0.625f ? small : big;
}

// erf: Taylor series for |x| < 1, else 1 - e^{-x^2} P(1/(1+a x)), Abramowitz & Stegun 7.1.26.
DEVICE float erf_f(float x) {
  float a = x < 0.f ? -x : x;
  float z = x * x;
  // Taylor: 2/sqrt(pi) sum (-1)^n x^(2n+1) / (n! (2n+1)), 11 terms, error below 1e-8 for |x| <= 1
  float s = 1.3122532963802806e-8f;
  s = fmaf(s, z, -1.4503852223150468e-7f);
  s = fmaf(s, z, 1.4589169000933706e-6f);
  s = fmaf(s, z, -1.3227513227513228e-5f);
  s = fmaf(s, z, 1.0683760683760684e-4f);
  s = fmaf(s, z, -7.5757575757575758e-4f);
  s = fmaf(s, z, 4.6296296296296294e-3f);
  s = fmaf(s, z, -2.3809523809523808e-2f);
  s = fmaf(s, z, 1.0000000000000000e-1f);
  s = fmaf(s, z, -3.3333333333333331e-1f);
  float small = fmaf(s * z, x, x) * 1.12837916709551257f;
  float t = 1.f / fmaf(0.3275911f, a, 1.f);
  float p = 1.061405429f;
  p = fmaf(p, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  float big = 1.f - p * t * exp_f(-z);
  big = x < 0.f ? -big : big;
  return a < 1.f ? small : big;
}
