// How to declare a kernel. One source, two compilers: nvcc makes a GPU kernel of it, the host C++ compiler (through
// shim/shim.h) a function that runs the same body on a CPU.
//
//   KERNEL(name, D=64,128)(const real* x, float* y, int n) { ... }
//
// build.rs reads the signature and writes (a) the `extern "C" __global__` instances name_64_f32, name_128_bf16, ...,
// (b) their CPU entry points and (c) a Rust launcher with a struct of named arguments. The signature may contain:
//   const T* x       input            T* y            output: every element the kernel promises is written
//   INOUT(T) y       read and written SCRATCH(T) s    work space, contents undefined before and after
//   MAYBE(const T) b input that may be null           MAYBE(T) y  output that may be null
//   const tensor_map& a  a matrix in memory and the box of it that one tma_load or tma_store moves; by value
// Scalars are sizes and constants. Whatever changes from step to step comes through a pointer, so that a step can be
// captured as a graph.
//
// Three kinds, by what the threads of a block share:
//   KERNEL_FLAT  nothing. On the CPU the body is inlined into a loop over threadIdx.
//   KERNEL_WARP  warp collectives of prim/warp.cuh; no barrier, no shared memory. On the CPU a warp is *one* thread
//                whose packs are 32 times as wide (LANES 1, WV = 32 V), so the compiler vectorises; sums are taken
//                in the order of the 32 lanes, so both give the same bits. The strict CPU mode runs 32 real lanes.
//   KERNEL       everything: barriers, shared memory, mma, async copies. On the CPU each thread is a fiber. Its lane is
//                threadIdx.x % 32; LANE, WCOL and the packs' collectives belong to KERNEL_WARP.
// HOT in the attribute list marks a kernel whose register spills fail the build check. THREADS=n is its largest block.
// SHARED=e is its dynamic shared memory in bytes, an expression of D and sizeof(real); without it the launch sets the size.
// WAITS marks a kernel that calls wait_for_previous itself.
// BLOCKS=d:n asks ptxas to leave registers for n blocks per SM in the instance D=d (otherwise it aims at a number of
// registers of its own choice and may spill to reach it).
#pragma once

// Facts that Rust needs too are written once, here or in a .cu, and generated into `crate::kernels`. At the start of a line:
//   EXPORT(int, NAME, 64);                      a constant (int: usize in Rust; unsigned: u32)
//   EXPORT_FN(name, d, d <= 128 ? 64 : 32);     a function of one int, for constant expressions
//   EXPORT_ENUM(name, FIRST, SECOND);           name::FIRST = 0, name::SECOND = 1
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif
#define EXPORT(type, name, value) constexpr type name = value
#define EXPORT_FN(name, parameter, ...) HOST_DEVICE constexpr int name(int parameter) { return __VA_ARGS__; }
#define EXPORT_ENUM(name, ...) \
  struct name { \
    enum { __VA_ARGS__ }; \
  }

// The device encodes this from `TensorMap` in src/device/mod.rs: in the driver's format on a GPU, unchanged on the CPU. Kernels
// only pass its address on.
#ifdef __CUDACC__
struct alignas(64) tensor_map {
  unsigned long long opaque[16];
};
#else
typedef shim::TensorMap tensor_map;
#endif

#define INOUT(T) T*
#define SCRATCH(T) T*
#define MAYBE(T) T*

#ifdef __CUDACC__
#define KERNEL(name, ...) template <int D> __device__ __forceinline__ void name
#define KERNEL_FLAT(name, ...) KERNEL(name)
#define KERNEL_WARP(name, ...) KERNEL(name)
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define LANES 32
#elif defined(TEMPER_STRICT)
#define KERNEL(name, ...) template <int D> static inline void name
#define KERNEL_FLAT(name, ...) KERNEL(name)
#define KERNEL_WARP(name, ...) KERNEL(name)
#define DEVICE static inline __attribute__((always_inline))
#define DEVICE_MEMBER inline __attribute__((always_inline))
#define LANES 32
#else
#define KERNEL(name, ...) template <int D> static inline void name
#define KERNEL_FLAT(name, ...) template <int D> inline __attribute__((always_inline)) void name##_t<D>::body
#define KERNEL_WARP(name, ...) KERNEL_FLAT(name)
#define DEVICE static inline __attribute__((always_inline))
#define DEVICE_MEMBER inline __attribute__((always_inline))
#define LANES 1
#endif

// On Hopper and newer a kernel's blocks start while the kernel before it in the stream ends, so that a launch costs no gap. Nothing
// that the kernel before wrote is there until this returns; and it returns only after that kernel has ended, which waited in the
// same way, so all earlier work is complete as well. build.rs calls it in front of every body, except where WAITS says that the
// body does. Before it, such a body may prefetch (prefetch_l2 in prim/async.cuh) and read memory that no kernel writes, only
// copies: a kernel behind a copy is not launched early. All threads call it.
DEVICE void wait_for_previous() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The qualifier of a kernel's pointers: `__restrict__`, by which nothing else writes what a `const` pointer names while the kernel
// exists. A kernel that is launched early exists while the one before it writes, so there it may not stand.
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
#define ENTRY_RESTRICT
#else
#define ENTRY_RESTRICT __restrict__
#endif

// The position of a thread. FLAT: its index in the grid. WARP: its warp's index in the grid, and its lane.
#define FLAT_INDEX ((long long)blockIdx.x * blockDim.x + threadIdx.x)
#define WARP_INDEX ((long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES)
#define LANE (int)(LANES == 1 ? 0 : threadIdx.x % LANES)
