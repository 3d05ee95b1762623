// The tile of a matrix product: how a block of 256 threads computes its part of C, for every kernel that multiplies.
//
// bf16: 128 x 128 of C in steps of k 32, three stages of cp.async, ldmatrix, mma.sync m16n8k16; a warp owns 64 x 32.
// f32: 64 x 64 in steps of 16, 4 x 4 per thread. Each element of C is one chain of sums over k from left to right.
// A kernel passes `fetch(step, ta, tb)`, which starts the copies of a step's operands (by load_tile), so that the chain may
// continue from one pair of operands to the next; and `put(row, col, x, y)`, which takes two neighbours of a row.
#pragma once
#include "prim/async.cuh"
#include "prim/mma.cuh"
#include "prim/vec.cuh"

// Rows and columns of a block's part of C, and its shared memory: three stages of two tiles (bf16), or two padded tiles (f32).
EXPORT_FN(tile_side, real_bytes, real_bytes == 2 ? 128 : 64);
EXPORT_FN(tile_shared, real_bytes, real_bytes == 2 ? 3 * 2 * 128 * 32 * 2 : 2 * 16 * (64 + 4) * 4);

enum Trans { NT, NN, TN };

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

// Where a tile's sums go: rows x cols of T with row stride ld, with an optional bias, optionally added to what is there.
template <class T>
struct Target {
  T* c;
  const real* bias;
  int ld, rows, cols;
  bool accumulate, paired;
  DEVICE_MEMBER Target(T* c, const real* bias, int rows, int cols, int ld, bool accumulate)
      : c(c), bias(bias), ld(ld), rows(rows), cols(cols), accumulate(accumulate),
        paired((((unsigned long long)c / sizeof(T)) | (unsigned)ld) % 2 == 0) {}
  // Stores x at (row, col) and y to its right, in one access where the address allows; what lies outside is dropped.
  DEVICE_MEMBER void put(int row, int col, float x, float y) const {
    if (row >= rows || col >= cols) return;
    const bool two = col + 1 < cols;
    if (bias) {
      x += to_float(bias[col]);
      if (two) y += to_float(bias[col + 1]);
    }
    T* to = c + (long long)row * ld + col;
    if (two && paired) {
      Two<T> old = {};
      if (accumulate) old = *(const Two<T>*)to;
      assign(old.x, accumulate ? to_float(old.x) + x : x);
      assign(old.y, accumulate ? to_float(old.y) + y : y);
      *(Two<T>*)to = old;
    } else {
      assign(to[0], accumulate ? to_float(to[0]) + x : x);
      if (two) assign(to[1], accumulate ? to_float(to[1]) + y : y);
    }
  }
};

// An operand in memory, rows x cols, zero outside. `chunk` starts the copy of 8 values, `at` returns one.
struct Matrix {
  const real* p;
  int ld, rows, cols;
  bool aligned;
  DEVICE_MEMBER Matrix(const real* p, int ld, int rows, int cols)
      : p(p), ld(ld), rows(rows), cols(cols), aligned(((((unsigned long long)p >> 1) | (unsigned)ld) & 7) == 0) {}
#ifdef REAL_BF16
  DEVICE_MEMBER void chunk(bf16* dst, int row, int col) const {
    int valid = row < rows ? cols - col : 0;
    valid = valid < 0 ? 0 : valid > 8 ? 8 : valid;
    const bf16* from = valid ? p + (long long)row * ld + col : p;
    if (aligned) {
      copy_async16(dst, from, valid * 2);
    } else {
      for (int j = 0; j < 8; ++j) dst[j] = j < valid ? from[j] : to_bf16(0.f);
    }
  }
#endif
  DEVICE_MEMBER float at(int row, int col) const {
    return row < rows && col < cols ? to_float(p[(long long)row * ld + col]) : 0.f;
  }
};

#ifdef REAL_BF16
constexpr int BM = tile_side(2), BN = BM, BK = 32, STAGES = 3;
constexpr int TILE = BM * BK;  // elements of one operand's tile, in either layout
static_assert(tile_shared(2) == STAGES * 2 * TILE * (int)sizeof(bf16), "the launch asks for what is used");

struct Sums {
  float v[4][4][4];
};

// Element offset of the 16-byte chunk holding (row, col) in a tile of 32 (k contiguous) or 128 (m or n contiguous)
// columns. The xor spreads the eight rows that one ldmatrix reads over all banks.
template <bool K_CONTIGUOUS>
DEVICE int chunk_at(int row, int col) {
  if (K_CONTIGUOUS) return row * 32 + (((col >> 3) ^ ((row >> 1) & 3)) << 3);
  return row * 128 + (((col >> 3) ^ (row & 7)) << 3);
}

// Starts the copy of one tile. K_CONTIGUOUS: 128 rows (of m or n, from `outer`) x 32 of k; else 32 rows (of k) x 128.
template <bool K_CONTIGUOUS, class Operand>
DEVICE void load_tile(bf16* tile, const Operand& src, int outer, int k0) {
  constexpr int COLS = K_CONTIGUOUS ? 32 : 128;
#pragma unroll
  for (int i = 0; i < TILE / 8 / 256; ++i) {
    const int c = (int)threadIdx.x + i * 256;
    const int r = c / (COLS / 8), col = c % (COLS / 8) * 8;
    src.chunk(tile + chunk_at<K_CONTIGUOUS>(r, col), (K_CONTIGUOUS ? outer : k0) + r, (K_CONTIGUOUS ? k0 : outer) + col);
  }
}

// The sums of a block over `steps` steps of k.
template <int TRANS, class Fetch>
DEVICE void multiply(Sums& acc, int steps, Fetch fetch) {
  constexpr bool AK = TRANS != TN, BK_CONTIGUOUS = TRANS == NT;
  bf16* shared = (bf16*)shared_base();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / 4 * 64, wn = warp % 4 * 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.v[i][j][e] = 0.f;

  auto start = [&](int step) {
    bf16* ta = shared + step % STAGES * 2 * TILE;
    if (step < steps) fetch(step, ta, ta + TILE);
    copy_commit();  // also when empty, so that copy_wait always counts the same groups
  };
  for (int s = 0; s < STAGES - 1; ++s) start(s);
  for (int step = 0; step < steps; ++step) {
    copy_wait<STAGES - 2>();
    block_sync();
    start(step + STAGES - 1);
    const bf16* ta = shared + step % STAGES * 2 * TILE;
    const bf16* tb = ta + TILE;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      unsigned fa[4][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
        if (AK)
          ldmatrix4<false>(fa[i], ta + chunk_at<true>(wm + i * 16 + half + r, kk + upper));
        else
          ldmatrix4<true>(fa[i], ta + chunk_at<false>(kk + upper + r, wm + i * 16 + half));
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
        unsigned two[4];
        if (BK_CONTIGUOUS)
          ldmatrix4<false>(two, tb + chunk_at<true>(wn + j * 8 + upper + r, kk + half));
        else
          ldmatrix4<true>(two, tb + chunk_at<false>(kk + half + r, wn + j * 8 + upper));
        fb[j][0] = two[0];
        fb[j][1] = two[1];
        fb[j + 1][0] = two[2];
        fb[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(acc.v[i][j], fa[i], fb[j]);
    }
  }
  copy_wait<0>();
}

template <class Put>
DEVICE void each_pair(const Sums& acc, int m0, int n0, Put put) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = m0 + warp / 4 * 64 + lane / 4, col = n0 + warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) put(row + i * 16 + h * 8, col + j * 8, acc.v[i][j][2 * h], acc.v[i][j][2 * h + 1]);
}
#else
constexpr int BM = tile_side(4), BN = BM, BK = 16;
constexpr int TILE = BK * (BM + 4);
static_assert(tile_shared(4) == 2 * TILE * (int)sizeof(float), "the launch asks for what is used");

struct Sums {
  float v[4][4];
};

template <bool K_CONTIGUOUS, class Operand>
DEVICE void load_tile(float* tile, const Operand& src, int outer, int k0) {
  // Neighbouring threads read neighbouring addresses along the contiguous dimension.
  for (int i = threadIdx.x; i < 64 * BK; i += 256) {
    const int r = K_CONTIGUOUS ? i / BK : i % 64, kk = K_CONTIGUOUS ? i % BK : i / 64;
    tile[kk * (64 + 4) + r] = K_CONTIGUOUS ? src.at(outer + r, k0 + kk) : src.at(k0 + kk, outer + r);
  }
}

template <int TRANS, class Fetch>
DEVICE void multiply(Sums& acc, int steps, Fetch fetch) {
  float* ta = (float*)shared_base();
  float* tb = ta + TILE;
  const int tm = threadIdx.x / 16 * 4, tn = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc.v[i][j] = 0.f;
  for (int step = 0; step < steps; ++step) {
    fetch(step, ta, tb);
    block_sync();
#pragma unroll
    for (int kk = 0; kk < BK; ++kk) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = ta[kk * (BM + 4) + tm + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = tb[kk * (BN + 4) + tn + j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc.v[i][j] = fmaf(x[i], y[j], acc.v[i][j]);
    }
    block_sync();
  }
}

template <class Put>
DEVICE void each_pair(const Sums& acc, int m0, int n0, Put put) {
  const int row = m0 + (int)threadIdx.x / 16 * 4, col = n0 + (int)threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; j += 2) put(row + i, col + j, acc.v[i][j], acc.v[i][j + 1]);
}
#endif

DEVICE int steps_of(int k) { return (k + BK - 1) / BK; }
