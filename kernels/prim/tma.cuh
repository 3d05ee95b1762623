// Bulk copies by tensor map (TMA) and the mbarriers that they complete (sm_90a). No other GPU target has these functions:
// the body of a Hopper kernel is inside `#if HOPPER` and empty elsewhere. The CPU has them all.
//
// A ring of stages, one thread producing:             each consumer warpgroup:
//   mbarrier_wait(&empty[s], phase ^ 1);                mbarrier_wait(&full[s], phase);
//   mbarrier_expect(&full[s], bytes of all copies);     ... wgmma on stage s, committed and waited for ...
//   tma_load(stage, &map, &full[s], x, y);              one thread: mbarrier_arrive(&empty[s]);
// with a count of 1 for full[s], one arrival per consumer for empty[s], and phase ^= 1 whenever s wraps around.
//
// In strict mode the destination of a load is poison until some thread has waited for its mbarrier, and the asynchronous
// proxy (TMA stores, wgmma) sees what threads wrote to shared memory only after a fence_async_proxy().
#pragma once
#include "prim/async.cuh"

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1

typedef unsigned long long mbarrier;  // 8 bytes of shared memory

#ifdef __CUDACC__
DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
#endif

// Called by one thread, once; then mbarrier_fence() by the same thread, then a barrier of the block.
DEVICE void mbarrier_init(mbarrier* b, int arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
#else
  shim::mbarrier_init(b, arrivals);
#endif
}
DEVICE void mbarrier_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Arrives, and makes the phase wait for `bytes` more bytes of copies.
DEVICE void mbarrier_expect(mbarrier* b, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
#else
  shim::mbarrier_arrive(b, bytes);
#endif
}
DEVICE void mbarrier_arrive(mbarrier* b) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
#else
  shim::mbarrier_arrive(b, 0);
#endif
}
// Arrives when all cp.async that this thread has started so far have landed; this counts as one of the expected arrivals.
DEVICE void mbarrier_arrive_copies(mbarrier* b) {
#ifdef __CUDACC__
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#else
  shim::mbarrier_arrive_copies(b);
#endif
}
// Waits until the phase of this parity is over: 0 for the first, 1 for the second, and so on. On a new barrier a wait for parity
// 1 returns at once.
DEVICE void mbarrier_wait(mbarrier* b, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
#else
  shim::mbarrier_wait(b, parity);
#endif
}

// Loads one box of the map from global memory, from column x and row y on, with zeros outside the matrix. Called by one thread.
// With 128-byte swizzle `dst` is a multiple of 1024 bytes.
DEVICE void tma_load(void* dst, const tensor_map* map, mbarrier* b, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(dst)),
      "l"(map), "r"(shared_address(b)), "r"(x), "r"(y)
      : "memory");
#else
  shim::bulk_load(dst, map, b, x, y);
#endif
}
// Stores one box to global memory and drops what lies outside the matrix. Called by one thread, after fence_async_proxy() by
// every thread that wrote the box and a barrier of them all. Counted in groups like cp.async.
DEVICE void tma_store(const tensor_map* map, const void* src, int x, int y) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(x), "r"(y)
               : "memory");
#else
  shim::bulk_store(map, src, x, y);
#endif
}
DEVICE void tma_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  shim::tma_commit();
#endif
}
// Waits until at most N of this thread's newest groups of stores still read shared memory (the rest may be overwritten).
template <int N>
DEVICE void tma_wait_read() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#else
  shim::tma_wait(N);
#endif
}
// Waits until at most N groups are unfinished. A thread that stored must wait for 0 before it ends.
template <int N>
DEVICE void tma_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#else
  shim::tma_wait(N);
#endif
}

// Makes this thread's writes to shared memory visible to TMA stores and wgmma after the next barrier.
DEVICE void fence_async_proxy() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  shim::fence_async_proxy();
#endif
}

// Barrier `id` (1 to 15) of `threads` threads, a multiple of 32; named_barrier_arrive counts without waiting.
DEVICE void named_barrier(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  shim::named_barrier(id, threads, true);
#endif
}
DEVICE void named_barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  shim::named_barrier(id, threads, false);
#endif
}

// Releases or takes registers for each thread of the warpgroup: N is a multiple of 8 from 24 to 256. The sum over the block must
// fit: 384 threads start with 168 each, which is 40 for a producer and 232 for two consumers, or 24 and 240. 40 and 240 hang.
template <int N>
DEVICE void registers_dec() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
DEVICE void registers_inc() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// Byte offset of the 16-byte chunk `chunk` (0 to 7) of row `row` in a tile of 128-byte rows with 128-byte swizzle.
DEVICE int swizzle128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
#endif
