// Warp collectives. All 32 lanes must take part: a collective under divergence is an error that the shim reports. With LANES 1
// (KERNEL_WARP on the CPU) one thread holds what 32 lanes would hold, lane after lane, and the sums below are taken in the order
// of the lanes: first each lane's own values from left to right, then the butterfly.
#pragma once
#include "prim/vec.cuh"

// For a KERNEL: one lane's view. A KERNEL_WARP uses `pack_sum` and `pack_max` instead (its fast CPU build has no lanes, so the
// functions below do not compile there).
template <class T>
DEVICE T shfl_xor(T v, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, v, mask);
#else
  return shim::shfl_xor(v, mask);
#endif
}
template <class T>
DEVICE T shfl(T v, int lane) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, v, lane);
#else
  return shim::shfl(v, lane);
#endif
}
DEVICE void warp_sync() {
#ifdef __CUDACC__
  __syncwarp();
#else
  shim::warp_sync();
#endif
}
// Whether p is true in any lane of the warp.
DEVICE bool warp_any(bool p) {
#ifdef __CUDACC__
  return __any_sync(0xffffffffu, p);
#else
  int any = p;
  for (int m = 16; m > 0; m >>= 1) any |= shfl_xor(any, m);
  return any != 0;
#endif
}
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) v += shfl_xor(v, m);
  return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) v = fmaxf(v, shfl_xor(v, m));
  return v;
}

// Sum over all values of the warp's packs.
DEVICE float pack_sum(const WarpPack& p) {
#if LANES == 32
  float s = p.v[0];
#pragma unroll
  for (int j = 1; j < V; ++j) s += p.v[j];
  return warp_sum(s);
#else
  float lane[32];
  for (int l = 0; l < 32; ++l) lane[l] = p.v[l * V];
  for (int j = 1; j < V; ++j)
    for (int l = 0; l < 32; ++l) lane[l] += p.v[l * V + j];
  for (int m = 16; m > 0; m >>= 1)
    for (int l = 0; l < m; ++l) lane[l] += lane[l + m];
  return lane[0];
#endif
}

// Largest of all values of the warp's packs. NaNs are ignored; -inf if there is nothing else.
DEVICE float pack_max(const WarpPack& p) {
#if LANES == 32
  float s = -__builtin_huge_valf();
#pragma unroll
  for (int j = 0; j < V; ++j) s = p.v[j] > s ? p.v[j] : s;
  return warp_max(s);
#else
  float lane[32];
  for (int l = 0; l < 32; ++l) lane[l] = -__builtin_huge_valf();
  for (int j = 0; j < V; ++j)
    for (int l = 0; l < 32; ++l) lane[l] = p.v[j * 32 + l] > lane[l] ? p.v[j * 32 + l] : lane[l];
  for (int m = 16; m > 0; m >>= 1)
    for (int l = 0; l < m; ++l) lane[l] = lane[l] > lane[l + m] ? lane[l] : lane[l + m];
  return lane[0];
#endif
}

// In the pack that starts at column i of a row of n this lane holds the values from `p + i + WCOL` on, of which `n - i - WCOL`
// exist.
#define WCOL (LANE * V)
constexpr int WARP_STEP = warp_columns(sizeof(real));

// Rows that a warp sums in the first stage of a sum over rows; sum_partials (reduce.cu) is the second.
EXPORT(int, SUM_ROWS, 64);

template <class T>
DEVICE WarpPack load_row(const T* row, int i, int n, float fill = 0.f) {
  return load<WV>(row + i, (long long)n - i, fill);
}
