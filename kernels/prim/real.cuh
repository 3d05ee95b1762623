// The storage type `real` (float, or bf16 in a bf16 build) and bf16 itself. Arithmetic is always float; a bf16 is rounded to
// nearest even when, and only when, it is stored.
#pragma once
#include "prim/kernel.cuh"

struct bf16 {
  unsigned short bits;
};

DEVICE float to_float(float v) { return v; }
DEVICE float to_float(bf16 v) {
#ifdef __CUDACC__
  return __uint_as_float((unsigned)v.bits << 16);
#else
  return shim::as_float((unsigned)v.bits << 16);
#endif
}

DEVICE bf16 to_bf16(float v) {
#ifdef __CUDACC__
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return {r};
#else
  unsigned u = shim::as_bits(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // cvt.rn's result for any NaN
  return {(unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

// Packs two floats as two bf16 in one word, `lo` in the low half: the operand format of mma.
DEVICE unsigned pack_bf16(float lo, float hi) {
#ifdef __CUDACC__
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return (unsigned)to_bf16(lo).bits | ((unsigned)to_bf16(hi).bits << 16);
#endif
}

#ifdef REAL_BF16
typedef bf16 real;
DEVICE real to_real(float v) { return to_bf16(v); }
#else
typedef float real;
DEVICE real to_real(float v) { return v; }
#endif

// v after a round trip through `real`.
DEVICE float round_real(float v) { return to_float(to_real(v)); }
