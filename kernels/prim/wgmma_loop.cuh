// What a loop of wgmma needs beside the products: accumulators that the compiler does not move, and cheap steps between operands.
#pragma once
#include "prim/wgmma.cuh"

#if HOPPER
// Call after wgmma_wait: the compiler moves no read or write of these accumulators across, so none comes before the wait.
template <int N>
DEVICE void hold(float (&d)[N]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Hides v from the optimiser: nothing that depends on it is computed, and held in registers, before this point.
DEVICE int hold(int v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// The operand `values` (a multiple of 8) further on in the same shared memory: one addition, where wgmma_desc takes five.
DEVICE wgmma_operand wgmma_step(wgmma_operand o, int values) {
#ifdef __CUDACC__
  return (o & ~0xffffffffull) | ((unsigned)o + (unsigned)(values / 8));
#else
  return {(const bf16*)o.tile + values, o.box};
#endif
}
#endif
