// Matrix product, level 6: tensor cores by mma.sync, fed by ldmatrix and cp.async. bf16 only.
//
// Changes  A warp multiplies 16 x 16 by 16 x 8 in one instruction. cp.async copies the tiles of later steps into shared memory
//          while this step multiplies, so no registers hold data in flight and latency is hidden; ldmatrix loads fragments.
// Math     C = A B
// Shapes   as matmul_1.cu, bf16
// Plan     8 warps own 128 x 128 of C, 64 x 32 each; 32 of k per step, three stages. Rows are swizzled: 16-byte chunks change
//          places, so that the eight rows of one ldmatrix lie in different banks (kernels/README.md has a drawing)
// Numerics a chain of float sums over k in steps of 16, inside the tensor core; C is rounded when stored
// Cost     2 m n k flops. H100, 8192^3, 2026-11-27: 355 TFLOP/s, 0.44 of the ceiling of 800 (310 predicted), as
//          kernels/matmul.cu, which has this structure (mma.sync cannot reach all of a Hopper's tensor cores). sm_90a: 126
//          registers, no spills.
#include "prim/async.cuh"
#include "prim/mma.cuh"

#ifdef REAL_BF16
constexpr int SIDE = 128, DEPTH = 32, STAGES = 3;
constexpr int TILE = SIDE * DEPTH;  // values per tile of A or of B

// Offset of the chunk of 8 values at (row, col) of a tile: rows of A have 32 values of k, rows of B 128 columns.
DEVICE int a_at(int row, int col) { return row * DEPTH + ((col / 8 ^ (row / 2 & 3)) * 8); }
DEVICE int b_at(int row, int col) { return row * SIDE + ((col / 8 ^ (row & 7)) * 8); }
#endif

KERNEL(level_matmul_6, SHARED=3 * 2 * 128 * 32 * 2)(real* c, const real* a, const real* b, int m, int n, int k) {
#ifdef REAL_BF16
  bf16* shared = (bf16*)shared_base();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp / 4 * 64, wn = warp % 4 * 32;  // the warp's part of the tile
  const long long row0 = blockIdx.y * SIDE, col0 = blockIdx.x * SIDE;
  const int steps = k / DEPTH;
  float sum[4][4][4] = {};  // 4 x 4 products of 16 x 8, four values per lane

  auto start = [&](int step) {
    bf16 *ta = shared + step % STAGES * 2 * TILE, *tb = ta + TILE;
    if (step < steps)
#pragma unroll
      for (int i = 0; i < TILE / 8 / 256; ++i) {
        const int chunk = threadIdx.x + i * 256;
        const int ar = chunk / (DEPTH / 8), ac = chunk % (DEPTH / 8) * 8, br = chunk / (SIDE / 8), bc = chunk % (SIDE / 8) * 8;
        copy_async16(ta + a_at(ar, ac), a + (row0 + ar) * k + step * DEPTH + ac, 16);
        copy_async16(tb + b_at(br, bc), b + (long long)(step * DEPTH + br) * n + col0 + bc, 16);
      }
    copy_commit();  // one group per step, even an empty one: the wait below counts groups
  };
  for (int s = 0; s < STAGES - 1; ++s) start(s);
  for (int step = 0; step < steps; ++step) {
    copy_wait<STAGES - 2>();  // this step's tiles have arrived for this thread,
    block_sync();             // and for the block; all warps have finished the previous step,
    start(step + STAGES - 1); // whose stage is filled again
    const bf16 *ta = shared + step % STAGES * 2 * TILE, *tb = ta + TILE;
    const int half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;  // the row that this lane addresses for ldmatrix
#pragma unroll
    for (int p = 0; p < DEPTH; p += 16) {
      unsigned fa[4][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix4<false>(fa[i], ta + a_at(wm + i * 16 + half + r, p + upper));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        unsigned two[4];  // B is stored in rows of k, a fragment needs columns: ldmatrix transposes
        ldmatrix4<true>(two, tb + b_at(p + half + r, wn + j * 8 + upper));
        fb[j][0] = two[0], fb[j][1] = two[1], fb[j + 1][0] = two[2], fb[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sum[i][j], fa[i], fb[j]);
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const long long row = row0 + wm + i * 16 + lane / 4 + h * 8, col = col0 + wn + j * 8 + lane % 4 * 2;
        *(unsigned*)(c + row * n + col) = pack_bf16(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
      }
#endif
}
