// Eight floats side by side, for kernels in which each thread walks along a row alone (KERNEL_FLAT): one SIMD register on a CPU,
// eight registers on a GPU. Compilers unroll short loops over arrays before they would vectorise them; a vector type they cannot
// unroll. Every operation is lane by lane, and the sums below have one order, so both give the same bits. F16 is two F8, in one
// register where the machine has registers of sixteen floats (in the unit that build/cpu.rs compiles a second time).
#pragma once
#include "prim/math.cuh"
#include "prim/vec.cuh"

#ifdef __CUDACC__
struct F8 {
  float v[8];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};
#define EACH_LANE(expression) \
  F8 r; \
  _Pragma("unroll") for (int i = 0; i < 8; ++i) r[i] = expression; \
  return r;
DEVICE F8 splat8(float a) { EACH_LANE(a) }
DEVICE F8 add8(F8 a, F8 b) { EACH_LANE(a[i] + b[i]) }
DEVICE F8 mul8(F8 a, F8 b) { EACH_LANE(a[i] * b[i]) }
DEVICE F8 max8(F8 a, F8 b) { EACH_LANE(max2(a[i], b[i])) }
DEVICE F8 fma8(F8 a, F8 b, F8 c) { EACH_LANE(fmaf(a[i], b[i], c[i])) }
DEVICE F8 load8(const float* p) { EACH_LANE(p[i]) }
DEVICE F8 load8(const bf16* p) {  // one access of 128 bits where the address allows
  const Pack<8> pack = load<8>(p, 8);
  EACH_LANE(pack.v[i])
}
DEVICE void store8(float* p, F8 a) {
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = a[i];
}
#else
typedef float F8 __attribute__((vector_size(32)));
DEVICE F8 splat8(float a) { return a - (F8){}; }
DEVICE F8 add8(F8 a, F8 b) { return a + b; }
DEVICE F8 mul8(F8 a, F8 b) { return a * b; }
DEVICE F8 max8(F8 a, F8 b) { return a > b ? a : b; }
DEVICE F8 fma8(F8 a, F8 b, F8 c) {
#if defined(__clang__) && __has_builtin(__builtin_elementwise_fma)
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  for (int i = 0; i < 8; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
DEVICE F8 load8(const float* p) {
  F8 r;
  memcpy(&r, p, sizeof r);
  return r;
}
DEVICE F8 load8(const bf16* p) {
  typedef unsigned short U16x8 __attribute__((vector_size(16)));
  typedef unsigned U32x8 __attribute__((vector_size(32)));
  U16x8 u;
  memcpy(&u, p, sizeof u);
  return (F8)(__builtin_convertvector(u, U32x8) << 16);
}
DEVICE void store8(float* p, F8 a) { memcpy(p, &a, sizeof a); }
#endif

DEVICE float sum8(F8 a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
DEVICE float largest8(F8 a) {
  return max2(max2(max2(a[0], a[4]), max2(a[2], a[6])), max2(max2(a[1], a[5]), max2(a[3], a[7])));
}

#if !defined(__CUDACC__) && defined(__AVX512F__)
typedef float F16 __attribute__((vector_size(64)));
DEVICE F16 splat16(float a) { return a - (F16){}; }
DEVICE F16 mul16(F16 a, F16 b) { return a * b; }
DEVICE F16 fma16(F16 a, F16 b, F16 c) { return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
DEVICE F16 load16(const float* p) {
  F16 r;
  memcpy(&r, p, sizeof r);
  return r;
}
DEVICE void store16(float* p, F16 a) { memcpy(p, &a, sizeof a); }
// The first eight lanes plus the last eight.
DEVICE F8 folded16(F16 a) {
  F8 half[2];
  memcpy(half, &a, sizeof a);
  return half[0] + half[1];
}
#else
struct F16 {
  F8 low, high;
};
DEVICE F16 splat16(float a) { return {splat8(a), splat8(a)}; }
DEVICE F16 mul16(F16 a, F16 b) { return {mul8(a.low, b.low), mul8(a.high, b.high)}; }
DEVICE F16 fma16(F16 a, F16 b, F16 c) { return {fma8(a.low, b.low, c.low), fma8(a.high, b.high, c.high)}; }
template <class T>
DEVICE F16 load16(const T* p) {
  return {load8(p), load8(p + 8)};
}
DEVICE void store16(float* p, F16 a) {
  store8(p, a.low);
  store8(p + 8, a.high);
}
DEVICE F8 folded16(F16 a) { return add8(a.low, a.high); }
#endif
