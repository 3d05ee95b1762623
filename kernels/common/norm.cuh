// What kernels with a root mean square norm share, so that they have the same bits. rmsnorm.cu has the math.
#pragma once
#include "prim/warp.cuh"

// A normed value before it is rounded: h = x * rstd, and the weight w.
DEVICE float weighted(float h, float w, float plus, int once) { return (w + plus) * (once ? h : round_real(h)); }

// One over the root of the mean square, from the sum of d squares.
DEVICE float rstd_of(float sum, int d, float eps) { return 1.f / sqrtf(sum / (float)d + eps); }

// For a KERNEL: the same from the squares that each lane of a warp has added up, in the order of pack_sum. All lanes call it.
DEVICE float rstd_by_lanes(const FlatPack& square, int d, float eps) {
  float sum = square.v[0];
#pragma unroll
  for (int j = 1; j < V; ++j) sum += square.v[j];
  return rstd_of(warp_sum(sum), d, eps);
}
