// The AdamW step of one parameter, and stochastic rounding: shared by the optimizer kernels, which differ in how moments are
// stored.
#pragma once
#include "prim/math.cuh"
#include "prim/rng.cuh"
#include "prim/vec.cuh"

// The scalars of a step. `hyper` [8] is on the device: lr, 1 - b1^t, sqrt(1 - b2^t), norm, clip factor.
struct AdamStep {
  float beta1, beta2, eps, step, keep, correction2, clip;
  DEVICE_MEMBER AdamStep(const float* hyper, float beta1, float beta2, float eps, float weight_decay, float lr_scale)
      : beta1(beta1), beta2(beta2), eps(eps), step(hyper[0] * lr_scale / hyper[1]),
        keep(1.f - hyper[0] * lr_scale * weight_decay), correction2(hyper[2]), clip(hyper[4]) {}
  // x: parameter, m and v: moments, g: gradient before clipping.
  DEVICE_MEMBER void apply(float& x, float& m, float& v, float g) const {
    const float e = g * clip;
    m = fmaf(beta1, m, (1.f - beta1) * e);
    v = fmaf(beta2, v, (1.f - beta2) * e * e);
    x = fmaf(-step, m / (sqrtf(v) / correction2 + eps), x * keep);
  }
};

// 16 random bits for each of the 8 values of the aligned group that contains index `i`; `use` is a tag of prim/rng.cuh.
struct Noise {
  unsigned words[4];
  DEVICE_MEMBER Noise(const int* key, long long i, int group, unsigned use) {
    const Philox r = philox((unsigned)key[0], (unsigned)key[1], (unsigned)(i / 8), (unsigned)key[2], (unsigned)group, use);
    words[0] = r.x, words[1] = r.y, words[2] = r.z, words[3] = r.w;
  }
  DEVICE_MEMBER unsigned at(int k) const { return words[k / 2] >> (k % 2 * 16) & 0xffffu; }
};

// Stochastic rounding to bf16: adds a uniform 16-bit number below the kept bits and truncates.
DEVICE float round_by_chance(float x, unsigned noise) {
  const unsigned bits = (unsigned)float_to_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? bits_to_float((int)((bits + noise) & 0xffff0000u)) : x;
}

// The N values from index i on; i is a multiple of N, and N divides 8.
template <int N>
DEVICE void round_by_chance(Pack<N>& x, const int* key, long long i, int group, unsigned use) {
  const Noise noise(key, i, group, use);
#pragma unroll
  for (int j = 0; j < N; ++j) x.v[j] = round_by_chance(x.v[j], noise.at((int)(i % 8) + j));
}
