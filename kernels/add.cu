// Element-wise sums, scaling and conversion between storage types.
//
// Math     add: y = a + b.  axpy: y (+)= scale x.  to_real / to_float: conversion, rounding to nearest even.
// Shapes   flat arrays of n elements
// Plan     One thread per V elements (128 bits of `real`).
// Numerics float arithmetic; a real is rounded once, when stored.
// Cost     add: 3 n sizeof(real) bytes read and written. *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "prim/vec.cuh"

KERNEL_FLAT(add_fwd)(real* y, const real* a, const real* b, long long n) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(a + i, n - i), q = load<V>(b + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] += q.v[j];
  store(y + i, p, n - i);
}

// y = scale x, or y += scale x
KERNEL_FLAT(axpy)(real* y, const real* x, float scale, long long n, int accumulate) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  FlatPack p = load<V>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < V; ++j) p.v[j] *= scale;
  store(y + i, p, n - i, accumulate);
}

// Converts float master values to the weights that kernels read.
KERNEL_FLAT(to_real_copy)(real* y, const float* x, long long n) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  store(y + i, load<V>(x + i, n - i), n - i);
}

KERNEL_FLAT(to_float_copy)(float* y, const real* x, long long n, int accumulate) {
  const long long i = FLAT_INDEX * V;
  if (i >= n) return;
  store(y + i, load<V>(x + i, n - i), n - i, accumulate);
}
