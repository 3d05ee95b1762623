// Tensor-core products of one warp (mma.sync m16n8k16, sm_80 and newer) and the loads that feed them (ldmatrix).
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A 16x16 row-major: a[0] = (g, 2t..), a[1] = (g+8, 2t..), a[2] = (g, 2t+8..), a[3] = (g+8, 2t+8..), two bf16 each
//   B 16x8  col-major: b[0] = rows 2t.. of column g, b[1] = rows 2t+8.. of column g
//   C 16x8  float:     c[0], c[1] = (g, 2t), (g, 2t+1); c[2], c[3] = (g+8, 2t), (g+8, 2t+1)
#pragma once
#include "prim/block.cuh"

#ifndef __CUDACC__
struct MmaLane {
  float* c;
  const unsigned* a;
  const unsigned* b;
};
static inline void mma_of_warp(void* const* lanes) {
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaLane& m = *(const MmaLane*)lanes[l];
    int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h)
        A[g + (i & 1) * 8][2 * t + (i >> 1) * 8 + h] = shim::as_float((h ? m.a[i] >> 16 : m.a[i] & 0xffffu) << 16);
    for (int i = 0; i < 2; ++i)
      for (int h = 0; h < 2; ++h) B[2 * t + i * 8 + h][g] = shim::as_float((h ? m.b[i] >> 16 : m.b[i] & 0xffffu) << 16);
  }
  float C[16][8];
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) C[r][c] = 0.f;
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < 8; ++c) C[r][c] += A[r][k] * B[k][c];
  for (int l = 0; l < 32; ++l) {
    float* c = ((const MmaLane*)lanes[l])->c;
    int g = l / 4, t = l % 4;
    c[0] += C[g][2 * t];
    c[1] += C[g][2 * t + 1];
    c[2] += C[g + 8][2 * t];
    c[3] += C[g + 8][2 * t + 1];
  }
}
struct LdmatrixLane {
  unsigned* r;
  const void* row;
};
template <bool TRANS>
static inline void ldmatrix_of_warp(void* const* lanes) {
  for (int m = 0; m < 4; ++m) {
    unsigned short tile[8][8];
    for (int r = 0; r < 8; ++r) memcpy(tile[r], ((const LdmatrixLane*)lanes[m * 8 + r])->row, 16);
    for (int l = 0; l < 32; ++l) {
      int g = l / 4, t = l % 4;
      unsigned lo = TRANS ? tile[2 * t][g] : tile[g][2 * t], hi = TRANS ? tile[2 * t + 1][g] : tile[g][2 * t + 1];
      ((const LdmatrixLane*)lanes[l])->r[m] = lo | hi << 16;
    }
  }
}
#endif

// c += a b over k = 16, accumulated in float.
DEVICE void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  MmaLane m = {c, a, b};
  shim::warp_collective("mma_bf16", &m, mma_of_warp);
#endif
}

// Loads four 8x8 tiles of 16-bit values. Lane 8i + j passes the (16-byte aligned) shared address of row j of tile i; each lane
// receives from tile i the values (lane/4, 2(lane%4)) and its right neighbour; with TRANS those of the transposed tile.
template <bool TRANS>
DEVICE void ldmatrix4(unsigned (&r)[4], const void* row) {
#ifdef __CUDACC__
  unsigned s = (unsigned)__cvta_generic_to_shared(row);
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#else
  shim::expect_shared16("ldmatrix4", row);
  LdmatrixLane m = {r, row};
  shim::warp_collective(TRANS ? "ldmatrix4.trans" : "ldmatrix4", &m, ldmatrix_of_warp<TRANS>);
#endif
}
