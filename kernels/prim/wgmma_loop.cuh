// What a loop of wgmma needs beside the products: accumulators that stay where they are, and cheap steps of operands.
#pragma once
#include "prim/wgmma.cuh"

// Whether it is true in some lane of the warp.
DEVICE bool warp_any(bool p) {
#ifdef __CUDACC__
  return __any_sync(0xffffffffu, p);
#else
  int any = p;
  for (int m = 16; m > 0; m >>= 1) any |= shfl_xor(any, m);
  return any != 0;
#endif
}

#if HOPPER
// Nothing that reads or writes these moves across: after wgmma_wait, so that no use of them comes before the wait.
template <int N>
DEVICE void hold(float (&d)[N]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// A number from which the compiler computes nothing ahead of this point: what follows from it takes no registers before.
DEVICE int hold(int v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// The operand `values` (a multiple of 8) further in the same shared memory: one addition, where wgmma_desc takes five.
DEVICE wgmma_operand wgmma_step(wgmma_operand o, int values) {
#ifdef __CUDACC__
  return (o & ~0xffffffffull) | ((unsigned)o + (unsigned)(values / 8));
#else
  return {(const bf16*)o.tile + values, o.box};
#endif
}
#endif
