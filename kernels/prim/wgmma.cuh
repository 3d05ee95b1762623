// Tensor-core products of a warpgroup (wgmma m64nNk16, sm_90a): four warps at once, with operands in shared memory.
//
// Fragments: warp w of the warpgroup owns rows 16 w to 16 w + 15; within them each lane owns the same elements as in mma.cuh:
//   D 64xN float: d[4c + 2h + e] = (row 16 w + lane / 4 + 8 h, column 8 c + lane % 4 * 2 + e)
//   A 64x16 in registers: a[0..3] as A of mma.m16n8k16, so the accumulators of one product, packed, are the A of the next
// Each element is one chain over k in steps of 16: bit for bit that of mma_bf16 (measured on an H100; the CPU does the same).
//
// Operands have 128-byte swizzle, as tma_load writes it with boxes 64 wide: 16-byte chunk c of 128-byte row r lies at
// swizzle128(r, c), and a tile starts at a multiple of 1024 bytes.
//   k contiguous:  rows (of m or n) of 64 k; the next 16 k are 16 elements further
//   else:          boxes of 64 (m or n) columns, rows of k; the next 16 k are 16 * 64 elements further, the next 64 of m
//                  or n are BOX bytes further (8192: boxes of 64 k)
#pragma once
#include "prim/mma.cuh"
#include "prim/tma.cuh"

#if HOPPER
#ifdef __CUDACC__
typedef unsigned long long wgmma_operand;
#else
typedef shim::WgmmaOperand wgmma_operand;
#endif

template <bool K_CONTIGUOUS, int BOX = 8192>
DEVICE wgmma_operand wgmma_desc(const bf16* tile) {
#ifdef __CUDACC__
  const unsigned long long lbo = K_CONTIGUOUS ? 1 : BOX >> 4, sbo = 1024 >> 4;
  return (unsigned long long)((shared_address(tile) & 0x3ffff) >> 4) | lbo << 16 | sbo << 32 | 1ull << 62;
#else
  return {tile, K_CONTIGUOUS ? 0 : BOX};
#endif
}

// Required before a warpgroup's first wgmma, and after it has touched accumulators or operands in registers.
DEVICE void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  shim::wgmma_fence();
#endif
}
DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  shim::wgmma_commit();
#endif
}
// Waits until at most N of the warpgroup's newest groups are in flight. Until then nothing may touch their accumulators, and
// their operands' memory may not be released.
template <int N>
DEVICE void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  shim::wgmma_wait(N);
#endif
}

#ifdef __CUDACC__
// wgmma_ss and wgmma_rs for one N: the list of its N/2 accumulators, then the numbers of the operands that follow.
#define TEN(p) \
  "%" #p "0,%" #p "1,%" #p "2,%" #p "3,%" #p "4,%" #p "5,%" #p "6,%" #p "7,%" #p "8,%" #p "9"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define WGMMA(N, LIST, R0, R1, R2, R3, R4, R5, R6, ...) \
  template <bool TRANS_A, bool TRANS_B> \
  DEVICE void wgmma_ss_n(float (&d)[N / 2], wgmma_operand a, wgmma_operand b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32.bf16.bf16 {" LIST "}, %" #R0 ", %" #R1 ", p, 1, 1, %" #R3 ", %" #R4 ";\n}" \
                 : __VA_ARGS__ \
                 : "l"(a), "l"(b), "r"(accumulate), "n"((int)TRANS_A), "n"((int)TRANS_B)); \
  } \
  template <bool TRANS_B> \
  DEVICE void wgmma_rs_n(float (&d)[N / 2], const unsigned (&a)[4], wgmma_operand b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32.bf16.bf16 {" LIST "}, {%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 \
                 ", p, 1, 1, %" #R6 ";\n}" \
                 : __VA_ARGS__ \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"((int)TRANS_B)); \
  }
WGMMA(8, "%0,%1,%2,%3",
      4, 5, 6, 7, 8, 9, 10,
      D4(0))
WGMMA(16, "%0,%1,%2,%3,%4,%5,%6,%7",
      8, 9, 10, 11, 12, 13, 14,
      D8(0))
WGMMA(32, TEN() ",%10,%11,%12,%13,%14,%15",
      16, 17, 18, 19, 20, 21, 22,
      D8(0), D8(8))
WGMMA(64, TEN() "," TEN(1) "," TEN(2) ",%30,%31",
      32, 33, 34, 35, 36, 37, 38,
      D8(0), D8(8), D8(16), D8(24))
WGMMA(128, TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) ",%60,%61,%62,%63",
      64, 65, 66, 67, 68, 69, 70,
      D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56))
WGMMA(192, TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7)
      "," TEN(8) ",%90,%91,%92,%93,%94,%95",
      96, 97, 98, 99, 100, 101, 102,
      D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88))
WGMMA(224, TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7) "," TEN(8)
      "," TEN(9) "," TEN(10) ",%110,%111",
      112, 113, 114, 115, 116, 117, 118,
      D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96), D8(104))
WGMMA(256, TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7) "," TEN(8)
      "," TEN(9) "," TEN(10) "," TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127",
      128, 129, 130, 131, 132, 133, 134,
      D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56), D8(64), D8(72), D8(80), D8(88), D8(96),
      D8(104), D8(112), D8(120))
#undef WGMMA
#undef D8
#undef D4
#undef TEN
#endif

// d = (accumulate ? d : 0) + A B over k = 16. TRANS: that operand is not contiguous in k. In flight until wgmma_wait.
template <int N, bool TRANS_A, bool TRANS_B>
DEVICE void wgmma_ss(float (&d)[N / 2], wgmma_operand a, wgmma_operand b, bool accumulate) {
#ifdef __CUDACC__
  wgmma_ss_n<TRANS_A, TRANS_B>(d, a, b, accumulate);
#else
  shim::wgmma(N, TRANS_A, TRANS_B, d, nullptr, a, b, accumulate);
#endif
}
template <int N, bool TRANS_B>
DEVICE void wgmma_rs(float (&d)[N / 2], const unsigned (&a)[4], wgmma_operand b, bool accumulate) {
#ifdef __CUDACC__
  wgmma_rs_n<TRANS_B>(d, a, b, accumulate);
#else
  shim::wgmma(N, false, TRANS_B, d, a, {}, b, accumulate);
#endif
}

#ifndef __CUDACC__
static inline void stmatrix_of_warp(void* const* lanes) {
  for (int m = 0; m < 4; ++m)
    for (int r = 0; r < 8; ++r) {
      unsigned row[4];
      for (int t = 0; t < 4; ++t) row[t] = ((const LdmatrixLane*)lanes[4 * r + t])->r[m];
      memcpy((void*)((const LdmatrixLane*)lanes[m * 8 + r])->row, row, 16);
    }
}
#endif
// The inverse of ldmatrix4: lane 8i + j passes the address of row j of tile i.
DEVICE void stmatrix4(void* row, const unsigned (&r)[4]) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  shim::expect_shared16("stmatrix4", row);
  LdmatrixLane m = {(unsigned*)r, row};
  shim::warp_collective("stmatrix4", &m, stmatrix_of_warp);
#endif
}
#endif
