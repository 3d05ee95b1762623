// Asynchronous copies from global to shared memory (cp.async, sm_80 and newer). In the shim the data arrives at the wait.
#pragma once
#include "prim/block.cuh"

// Copies 16 bytes: reads only the first `valid` (0 to 16) and writes zeros for the rest. Both addresses are 16-byte aligned.
DEVICE void copy_async16(void* shared, const void* global, int valid) {
#ifdef __CUDACC__
  unsigned s = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(global), "r"(valid) : "memory");
#else
  shim::async_copy(shared, global, 16, (unsigned)valid);
#endif
}
DEVICE void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  shim::async_commit();
#endif
}
// Waits until at most N of this thread's newest groups are still in flight. Other threads see the data after a barrier.
template <int N>
DEVICE void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  shim::async_wait(N);
#endif
}

// Starts a prefetch into L2 of the 128 bytes around p. It can be too early to help, never wrong: all writes meet in L2.
DEVICE void prefetch_l2(const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}
