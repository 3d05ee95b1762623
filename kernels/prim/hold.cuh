// For accumulators that the tensor cores fill behind the compiler's back (wgmma).
#pragma once
#include "prim/warp.cuh"

// Nothing that reads or writes these moves across: after wgmma_wait, so that no use of them comes before the wait.
template <int N>
DEVICE void hold(float (&d)[N]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

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
