// CUDA on a CPU, for the host compiler only: what a kernel uses when it is compiled by g++ or clang++.
//
// FLAT and WARP kernels run as loops. A KERNEL runs each thread of a block as a fiber on the calling OS thread; a fiber yields
// only at a barrier, a collective or a wait for an mbarrier. A collective is computed once, by the last lane to arrive. Strict
// mode (tests, `temper check`) runs lanes in an order permuted by the seed, poisons shared memory, and turns into errors:
// divergent collectives, barriers that some threads skip, deadlocks, writes past shared memory, async copies that nothing waited
// for or that are misaligned, and the mistakes specific to Hopper kernels (kernels/shim/planted.cu and planted_hopper.cu have one
// of each). A kernel that passes here can still fail on a GPU: the memory model is not emulated.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline

// Every function defined here is `static`: units are compiled for several instruction sets (build/cpu.rs), and a linker may keep
// any one copy of a function that they share.
#define __restrict__ __restrict

namespace shim {

struct Dim3 {
  unsigned x, y, z;
};

// One call runs the blocks [block_begin, block_end) of a grid on this OS thread. Must match `CpuLaunch` in `src/device/mod.rs`.
struct Launch {
  void* const* args;
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  unsigned strict;
  uint64_t seed;
  uint64_t block_begin, block_end;
  char* error;  // a message written here makes the launch fail
  size_t error_bytes;
};

static inline float as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline unsigned as_bits(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}

// A KERNEL_FLAT or KERNEL_WARP body is a member of this: its indices are plain members, so that the thread loop inlines.
// Functions that such a body may not use are deleted here, so that using one fails to compile instead of failing at run time.
struct FlatThread {
  Dim3 threadIdx, blockIdx, blockDim, gridDim;
  template <class T>
  static T shfl(T, int) = delete;
  template <class T>
  static T shfl_xor(T, int) = delete;
  static float warp_sum(float) = delete;
  static float warp_max(float) = delete;
  static void warp_sync() = delete;
  static void block_sync() = delete;
  static unsigned char* shared_base() = delete;
};

static inline void set_block(FlatThread& t, const Launch& l, uint64_t b) {
  t.gridDim = {l.grid[0], l.grid[1], l.grid[2]};
  t.blockIdx = {(unsigned)(b % l.grid[0]), (unsigned)(b / l.grid[0] % l.grid[1]), (unsigned)(b / l.grid[0] / l.grid[1])};
}

// --- fibers (shim.cpp) ---
typedef void (*Body)(void*);
void run_fibers(const Launch& l, Body body, void* arg);
void run_permuted(const Launch& l, Body body, void* arg);  // FLAT kernels in strict mode: one thread after another

template <class F>
static void fibers(const Launch& l, F f) {
  run_fibers(l, [](void* p) { (*(F*)p)(); }, &f);
}
template <class F>
static void permuted(const Launch& l, F f) {
  run_permuted(l, [](void* p) { (*(F*)p)(); }, &f);
}

// A collective of the 32 lanes of a warp. `compute` receives the data pointers of the 32 lanes, in lane order.
typedef void (*WarpCompute)(void* const* lanes);
void warp_collective(const char* name, void* mine, WarpCompute compute);
void block_barrier();
unsigned char* shared_memory();

// Strict mode: checks that the 16 bytes at p are inside the launch's shared memory and 16-byte aligned, as ldmatrix and cp.async
// require.
void expect_shared16(const char* what, const void* p);

// Async copies of a thread land when it waits for their group, not before.
void async_copy(void* dst, const void* src, unsigned bytes, unsigned valid_bytes);
void async_commit();
void async_wait(int newest_groups_left_in_flight);

struct ShuffleLane {
  unsigned long long value;
  int source;
};
void shuffle(ShuffleLane* mine);

template <class T>
static T shfl(T v, int lane) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  ShuffleLane s = {0, lane & 31};
  memcpy(&s.value, &v, sizeof(T));
  shuffle(&s);
  memcpy(&v, &s.value, sizeof(T));
  return v;
}
int lane_id();
template <class T>
static T shfl_xor(T v, int mask) {
  return shfl(v, lane_id() ^ mask);
}
void warp_sync();

// Lets other OS threads run while a block waits for another block.
void yield_thread();

// --- Hopper (hopper.h): prim/tma.cuh and prim/wgmma.cuh document each function ---
// A row-major matrix and the box of it that one copy moves. `Device::encode_map` in `device/mod.rs` writes it.
struct alignas(64) TensorMap {
  uint64_t address, row_bytes;  // row_bytes: from one row to the next
  uint32_t rows, cols, box_rows, box_cols, element_bytes, swizzled;
  uint32_t unused[22];
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

// box: bytes between boxes of 64 columns; 0 if k is contiguous.
struct WgmmaOperand {
  const void* tile;
  int box;
};
void mbarrier_init(unsigned long long* b, int arrivals);
void mbarrier_arrive(unsigned long long* b, int expected_bytes);
void mbarrier_arrive_copies(unsigned long long* b);
void mbarrier_wait(unsigned long long* b, int parity);
void bulk_load(void* dst, const TensorMap* map, unsigned long long* b, int x, int y);
void bulk_store(const TensorMap* map, const void* src, int x, int y);
void tma_commit();
void tma_wait(int newest_groups_left_in_flight);
void fence_async_proxy();
void named_barrier(int id, int threads, bool wait);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest_groups_left_in_flight);
// a_registers: the four words of A, or null if A is `a`.
void wgmma(int n, bool trans_a, bool trans_b, float* d, const unsigned* a_registers, WgmmaOperand a, WgmmaOperand b,
           bool accumulate);

}  // namespace shim

extern __thread shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;
