// Tile after tile of a product on Hopper whose end takes about as long as its products: two consumers take tiles in turn, so one
// multiplies while the other computes. (In hopper_product.cuh both share a tile and end it together, and then nobody multiplies.) The
// ring is filled in the order of the tiles, and a consumer passes the turn on with its last products under way. Each warp of a
// consumer has boxes of 16 x 64 real for what comes and goes by TMA.
#pragma once
#include "common/hopper_product.cuh"

// The block's shared memory: `stages` of (rows + 128) x 64 values, 8 warps' boxes of 2048 bytes, barriers.
EXPORT_FN(turns_ring, rows, (rows + 128) * 128);
EXPORT(int, TURNS_BARRIERS, 512);

#if defined(REAL_BF16) && defined(HOPPER)
// A warp's place in a tile: the first of its rows (it has 16 of each 64), and the tile's first column.
struct TilePlace {
  int row, col;
};

// Where this lane's address for stmatrix4 and ldmatrix4 lies in a box: rows 0 and 8 of columns 8 x, then the same of 8 x + 8.
DEVICE int box_at(int lane, int x) { return swizzle128(lane / 8 % 2 * 8 + lane % 8, x + lane / 16); }

// What the end of a tile works with: a warp's boxes, and two barriers for what it loads into them.
struct TileEnd {
  unsigned char* boxes;
  mbarrier* loaded;
  int turn;

  DEVICE_MEMBER void halfway(const TilePlace&, int) const {}

  // Stores 16 x 64 values by the first two boxes in turn: value(c, y) is this lane's pair of columns of group c of 8, for row
  // y * 8; last(box) may change the box before it goes.
  template <class Value, class Last>
  DEVICE_MEMBER void put(const tensor_map* map, int row, int col, int lane, Value value, Last last) {
    unsigned char* box = boxes + (turn++ & 1) * 2048;
    if (lane == 0) tma_wait_read<1>();  // the box used two turns ago has been read
    warp_sync();
#pragma unroll
    for (int x = 0; x < 8; x += 2) {
      unsigned r[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) r[y] = value(x + y / 2, y % 2);
      stmatrix4(box + box_at(lane, x), r);
    }
    last(box);
    fence_async_proxy();
    warp_sync();
    if (lane == 0) {
      tma_store(map, box, col, row);
      tma_commit();
    }
  }
};

// tm x tn tiles of HALVES x 64 rows, of `steps` steps of k. load(to, arrived, q, j) loads 128 columns of B, 64 k from step q on, for
// tiles of column j, COLS columns of C each. `end` is told when half of a tile's products are started, and takes the sums when all
// are done.
template <int TRANS, int HALVES, int STAGES, int BOXES, int COLS, class Load, class End>
DEVICE void tiles_in_turns(const tensor_map& a, int tm, int tn, int steps, int group, Load load, End end) {
  constexpr int TILE_A = HALVES * 64 * DEPTH, TILE_B = 128 * DEPTH;
  static_assert(STAGES * turns_ring(HALVES * 64) + 8 * BOXES * 2048 + TURNS_BARRIERS <= 227 * 1024, "what a block of Hopper may have");
  bf16* sa = (bf16*)shared_base();                                // STAGES x HALVES x 64 x 64
  bf16* sb = sa + STAGES * TILE_A;                                // STAGES x 128 x 64
  unsigned char* boxes = (unsigned char*)(sb + STAGES * TILE_B);  // BOXES a warp
  mbarrier* full = (mbarrier*)(boxes + 8 * BOXES * 2048);
  mbarrier *empty = full + STAGES, *turn = empty + STAGES;  // turn: one a consumer
  mbarrier* loaded = turn + 2;                              // two a warp
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 1);
    }
    for (int i = 0; i < 2 + 16; ++i) mbarrier_init(turn + i, 1);
    mbarrier_fence();
  }
  block_sync();
  int i, j;

  if (warpgroup == 0) {
    registers_dec<HALVES == 3 ? 24 : 40>();
    if (threadIdx.x != 0) return;
    int stage = 0, phase = 0;
    for (int tile = blockIdx.x; tile < tm * tn; tile += gridDim.x) {
      place(tile, tm, tn, group, i, j);
      for (int q = 0; q < steps; ++q) {
        mbarrier_wait(empty + stage, phase ^ 1);
        mbarrier* arrived = full + stage;
        mbarrier_expect(arrived, (TILE_A + TILE_B) * 2);
        bf16 *ta = sa + stage * TILE_A, *tb = sb + stage * TILE_B;
        tma_load(ta, &a, arrived, q * DEPTH, i * HALVES * 64);
        load(tb, arrived, q, j);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  registers_inc<HALVES == 3 ? 240 : 232>();
  const int w = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  end.boxes = boxes + (w * 4 + warp) * BOXES * 2048;
  end.loaded = loaded + (w * 4 + warp) * 2;
  if (w == 1 && thread == 0) mbarrier_arrive(turn);  // the first turn
  // `done`: the steps of all tiles before this one, the other consumer's included.
  int done = w * steps, turns = 0;
  for (int tile = blockIdx.x + w * gridDim.x; tile < tm * tn; tile += 2 * gridDim.x, done += 2 * steps) {
    place(tile, tm, tn, group, i, j);
    const TilePlace at = {i * HALVES * 64 + warp * 16, j * COLS};
    int stage = done % STAGES, phase = done / STAGES & 1, last = -1;
    float d[HALVES][64];
    // A parity says which of two rounds of the ring is meant, so nobody may be ahead by more than one: the other consumer has
    // waited for all stages before these.
    mbarrier_wait(turn + w, turns++ & 1);
    for (int q = 0; q < steps; ++q) {
      mbarrier_wait(full + stage, phase);
      const bf16 *ta = sa + stage * TILE_A, *tb = sb + stage * TILE_B;
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < DEPTH; kk += 16)
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
          wgmma_ss<128, false, TRANS != NT>(d[h], wgmma_desc<true>(ta + h * 64 * DEPTH + kk),
                                            wgmma_desc<TRANS == NT>(tb + (TRANS == NT ? kk : kk * 64)), q > 0 || kk > 0);
      wgmma_commit();
      if (last >= 0) {
        wgmma_wait<1>();
        if (thread == 0) mbarrier_arrive(empty + last);
      }
      last = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
      if (q == steps / 2) end.halfway(at, lane);
    }
    // The turn passes while the last products run. With one step, nothing but their end shows that all four warps had the turn.
    if (steps > 1 && thread == 0) mbarrier_arrive(turn + (w ^ 1));
    wgmma_wait<0>();
    if (thread == 0) {
      mbarrier_arrive(empty + last);
      if (steps == 1) mbarrier_arrive(turn + (w ^ 1));
    }
    end.finish(at, lane, d);
  }
  if (lane == 0) tma_wait<0>();
}
#endif
