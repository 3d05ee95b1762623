// log(1 + x), e^x - 1 and the functions that the preference losses build from them, without cancellation: log sigmoid, log(1 -
// e^x). The corrected quotients are Kahan's: where 1 + x (or e^x) is rounded, the effect of the rounding on the logarithm is
// divided out again, so the error is a few units in the last place for every x.
#pragma once
#include "prim/math.cuh"

DEVICE float log1p_f(float x) {
  const float u = 1.f + x;
  return u == 1.f ? x : log_f(u) * (x / (u - 1.f));
}

DEVICE float expm1_f(float x) {
  const float u = exp_f(x), um = u - 1.f;
  return um == 0.f ? x : (um == -1.f || x > 80.f) ? um : um * (x / log_f(u));
}

// log(1 + e^x) = -log sigmoid(-x)
DEVICE float softplus_f(float x) {
  const float e = exp_f(x < 0.f ? x : -x);
  return max2(x, 0.f) + log1p_f(e);  // NaN propagates through e
}

// log(1 - e^x) for x < 0 (Maechler, "Accurately computing log(1 - exp(-|a|))", 2012)
DEVICE float log1mexp_f(float x) { return x < -0.693147181f ? log1p_f(-exp_f(x)) : log_f(-expm1_f(x)); }
