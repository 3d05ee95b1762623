// What the threads of a block share: the barrier and dynamic shared memory.
#pragma once
#include "prim/warp.cuh"

DEVICE void block_sync() {
#ifdef __CUDACC__
  __syncthreads();
#else
  shim::block_barrier();
#endif
}

#ifdef __CUDACC__
extern __shared__ __align__(1024) unsigned char dynamic_shared[];
#endif

// All of the block's shared memory; its size is set at launch. A kernel places its arrays in it by offset.
DEVICE unsigned char* shared_base() {
#ifdef __CUDACC__
  return dynamic_shared;
#else
  return shim::shared_memory();
#endif
}
