// Bugs that the strict CPU mode must catch, each beside its correct twin. CPU only: tests/it/shim.rs runs them.
//
// Math     y = x for the twins (D = 0), unless a kernel says otherwise; D > 0 plants the bug
// Shapes   x, y [n] float, one block of n threads
// Plan     one thread per element
// Numerics copies only
// Cost     nothing; never launched outside the tests
#include "prim/async.cuh"

// y[i] = x[i ^ 1]. D = 1: half of the lanes are in another collective; D = 2: half of the lanes are in no collective.
KERNEL(planted_divergence, D=0,1,2)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float v = x[i];
  if (D == 0 || i % 32 < 16)
    v = shfl_xor(v, 1);
  else if (D == 1)
    warp_sync();
  if (i < n) y[i] = v;
}

// D = 1: thread 5 skips the barrier.
KERNEL(planted_barrier, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float* s = (float*)shared_base();
  s[i] = x[i];
  if (D == 0 || i != 5) block_sync();
  if (i < n) y[i] = s[i];
}

// D = 1: half of each warp waits for the other half, which waits at the block barrier.
KERNEL(planted_deadlock, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  if (D == 0 || i % 32 < 16) {
    warp_sync();
    block_sync();
  } else {
    block_sync();
    warp_sync();
  }
  if (i < n) y[i] = x[i];
}

// y[i] = x[n - 1 - i], through shared memory of 2 n floats. D = 1 reads the half that was never written.
KERNEL(planted_unwritten, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float* s = (float*)shared_base();
  s[i] = x[i];
  block_sync();
  y[i] = s[D == 0 ? n - 1 - i : n + i];
}

// D = 1: also writes one element past the end of y; D = 2: one before its start.
KERNEL(planted_bounds, D=0,1,2)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (D == 1 && i == 0) y[n] = 1.f;
  if (D == 2 && i == 0) y[-1] = 1.f;
}

// D = 1 reads one element past the end of x.
KERNEL(planted_read, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  if (i < n) y[i] = x[i + D];
}

// D = 1: writes past the shared memory of the launch, which is n floats.
KERNEL(planted_shared, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float* s = (float*)shared_base();
  s[i] = x[i];
  if (D == 1 && i == 0) s[n] = 1.f;
  block_sync();
  y[i] = s[i];
}

// y = x by async copies of four values per thread. D = 1 never waits; D = 2 waits after it has read; D = 3 copies from an address
// that is not a multiple of 16.
KERNEL(planted_copy, D=0,1,2,3)(float* y, const float* x, int n) {
  const int i = threadIdx.x * 4;
  float* s = (float*)shared_base();
  if (i < n) copy_async16(s + i, x + i + (D == 3 && i == 0 ? 1 : 0), 16);
  copy_commit();
  if (D == 0 || D == 3) copy_wait<0>();
  block_sync();
  if (i < n)
    for (int j = 0; j < 4; ++j) y[i + j] = s[i + j];
  if (D == 2) copy_wait<0>();
}

// y[i] = 3 x[n - 1 - i], in two rounds through the same shared memory. D = 1 writes the second round without waiting for
// the readers of the first.
KERNEL(planted_race, D=0,1)(float* y, const float* x, int n) {
  const int i = threadIdx.x;
  float* s = (float*)shared_base();
  s[i] = x[i];
  block_sync();
  const float first = s[n - 1 - i];
  if (D == 0) block_sync();
  s[i] = 2.f * x[i];
  block_sync();
  y[i] = first + s[n - 1 - i];
}
