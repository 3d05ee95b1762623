// Flags in global memory by which one block tells another that its results are ready. A block may only wait for blocks of a
// smaller index: those start first, both on a GPU with few SMs and on the CPU.
#pragma once
#include "prim/block.cuh"

// Called by one thread, after a barrier of all threads that wrote.
DEVICE void flag_set(int* flag) {
#ifdef __CUDACC__
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
#else
  __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
#endif
}
// Called by one thread, before a barrier of all threads that read.
DEVICE void flag_wait(const int* flag) {
#ifdef __CUDACC__
  int set;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  while (!set);
#else
  while (!__atomic_load_n(flag, __ATOMIC_ACQUIRE)) shim::yield_thread();
#endif
}
