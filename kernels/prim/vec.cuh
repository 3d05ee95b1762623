// Packs: the V (flat) or WV (warp) consecutive values that one thread moves at once, as floats in registers. V reals are 16
// bytes, so on the GPU each load and store below is one 128-bit access if the pack is whole and aligned (row starts and lengths
// are multiples of V in every real model); a ragged end takes the element-wise path.
#pragma once
#include "prim/real.cuh"

// Values that a thread moves at once, given the bytes of a value.
EXPORT_FN(pack_width, bytes, 16 / bytes);
// Columns that a warp covers at once.
EXPORT_FN(warp_columns, bytes, 32 * pack_width(bytes));
constexpr int V = pack_width(sizeof(real));
constexpr int WV = LANES == 1 ? 32 * V : V;  // a warp moves 32 V values; on the CPU its single lane moves them all

template <int N>
struct Pack {
  float v[N];
};
typedef Pack<V> FlatPack;
typedef Pack<WV> WarpPack;

#ifdef __CUDACC__
template <class T>
DEVICE bool aligned16(const T* p) { return ((unsigned long long)p & 15) == 0; }
#endif

// The first min(n, N) values at p; the rest is `fill`.
template <int N, class T>
DEVICE Pack<N> load(const T* p, long long n, float fill = 0.f) {
  Pack<N> r;
#ifdef __CUDACC__
  constexpr int W = 16 / sizeof(T);  // values in 128 bits
  if (N % W == 0 && n >= N && aligned16(p)) {
#pragma unroll
    for (int i = 0; i < N; i += W) {
      uint4 u = *reinterpret_cast<const uint4*>(p + i);
      const T* e = reinterpret_cast<const T*>(&u);
#pragma unroll
      for (int j = 0; j < W; ++j) r.v[i + j] = to_float(e[j]);
    }
    return r;
  }
#else
  if (n >= N) {
    for (int i = 0; i < N; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) r.v[i] = i < n ? to_float(p[i]) : fill;
  return r;
}

DEVICE void assign(float& d, float v) { d = v; }
DEVICE void assign(bf16& d, float v) { d = to_bf16(v); }

// Stores the first min(n, N) values, or with `accumulate` adds them to memory.
template <int N, class T>
DEVICE void store(T* p, Pack<N> r, long long n, bool accumulate = false) {
  if (accumulate) {
    Pack<N> old = load<N>((const T*)p, n);
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] += old.v[i];
  }
#ifdef __CUDACC__
  constexpr int W = 16 / sizeof(T);
  if (N % W == 0 && n >= N && aligned16(p)) {
#pragma unroll
    for (int i = 0; i < N; i += W) {
      uint4 u;
      T* e = reinterpret_cast<T*>(&u);
#pragma unroll
      for (int j = 0; j < W; ++j) assign(e[j], r.v[i + j]);
      *reinterpret_cast<uint4*>(p + i) = u;
    }
    return;
  }
#else
  if (n >= N) {
    for (int i = 0; i < N; ++i) assign(p[i], r.v[i]);
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < n) assign(p[i], r.v[i]);
}

// The N values of a pack in their storage format. `load` converts, and so waits for the data; a thread that fetches several packs
// and converts them later has all their loads in flight at once. For whole packs only: p is a multiple of 16 bytes, and a pack
// lies either within the next n values or outside (on a CPU, where packs are wider, the rest of a pack is zero).
template <int N, class T>
struct Packed {
#ifdef __CUDACC__
  uint4 u[N * sizeof(T) / 16];
#else
  T e[N];
#endif
};

template <int N, class T>
DEVICE Packed<N, T> fetch(const T* p, long long n) {
  Packed<N, T> r;
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < (int)(N * sizeof(T) / 16); ++i)
    r.u[i] = n >= N ? reinterpret_cast<const uint4*>(p)[i] : make_uint4(0, 0, 0, 0);
#else
  for (int i = 0; i < N; ++i) r.e[i] = i < n ? p[i] : T{};
#endif
  return r;
}

template <int N, class T>
DEVICE Pack<N> values(const Packed<N, T>& p) {
  Pack<N> r;
#ifdef __CUDACC__
  const T* e = reinterpret_cast<const T*>(p.u);
#else
  const T* e = p.e;
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) r.v[i] = to_float(e[i]);
  return r;
}

template <class T, int N>
DEVICE Packed<N, T> packed(const Pack<N>& v) {
  Packed<N, T> r;
#ifdef __CUDACC__
  T* e = reinterpret_cast<T*>(r.u);
#else
  T* e = r.e;
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) assign(e[i], v.v[i]);
  return r;
}

template <int N, class T>
DEVICE void put(T* p, const Packed<N, T>& r, long long n) {
#ifdef __CUDACC__
  if (n < N) return;
#pragma unroll
  for (int i = 0; i < (int)(N * sizeof(T) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = r.u[i];
#else
  for (int i = 0; i < N; ++i)
    if (i < n) p[i] = r.e[i];
#endif
}

// Whether the packs at p and at every multiple of `stride` values from it are aligned.
template <class T>
DEVICE bool whole_packs(const T* p, long long stride) {
  return (((unsigned long long)p / sizeof(T) | (unsigned long long)stride) % V) == 0;
}
