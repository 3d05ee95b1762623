// 8-bit and 4-bit code books: search for the nearest entry of a sorted map, loads and stores of codes.
#pragma once
#include "prim/math.cuh"
#include "prim/vec.cuh"

// Values per NF4 scale; scales per scale in double quantisation, and 8-bit moments per scale.
EXPORT(int, NF4_BLOCK, 64);
EXPORT(int, CODE8_BLOCK, 256);
// Entries of the maps.
EXPORT(int, NF4_MAP, 16);
EXPORT(int, CODE8_MAP, 256);

// The entry of a sorted map of N (a power of two) values that is nearest to v; on a tie, the lower one.
template <int N>
DEVICE int nearest_code(const float* map, float v) {
  int at = 0;
#pragma unroll
  for (int step = N / 2; step > 0; step >>= 1) {
    const int below = at + step - 1;
    at += (map[below] + map[below + 1]) * 0.5f < v ? step : 0;
  }
  return at;
}

DEVICE float clamp_one(float v) { return v < -1.f ? -1.f : v > 1.f ? 1.f : v; }

// The factor that maps a block to [-1, 1]. For a block of zeros it is a large finite number.
DEVICE float code_scale(float absmax) { return 1.f / (absmax < 1e-38f ? 1e-38f : absmax); }

// The first min(n, N) codes at p; the rest is 0. One access where N bytes are whole and aligned.
template <int N>
DEVICE void load_codes(int (&c)[N], const unsigned char* p, long long n) {
#ifdef __CUDACC__
  if (N % 4 == 0 && n >= N && ((unsigned long long)p & 3) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const unsigned word = *reinterpret_cast<const unsigned*>(p + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i + j] = (int)(word >> (8 * j) & 255u);
    }
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) c[i] = i < n ? p[i] : 0;
}

template <int N>
DEVICE void store_codes(unsigned char* p, const int (&c)[N], long long n) {
#ifdef __CUDACC__
  if (N % 4 == 0 && n >= N && ((unsigned long long)p & 3) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      *reinterpret_cast<unsigned*>(p + i) =
          (unsigned)c[i] | (unsigned)c[i + 1] << 8 | (unsigned)c[i + 2] << 16 | (unsigned)c[i + 3] << 24;
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < n) p[i] = (unsigned char)c[i];
}
