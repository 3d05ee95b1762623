// The persistent product on Hopper: a ring of stages filled by TMA, two warpgroups of wgmma, and where C goes. matmul_hopper.cu says
// how it works; kernels with other operands or another end build on it.
#pragma once
#include "common/low_rank.cuh"
#include "prim/flag.cuh"
#include "prim/tile.cuh"
#include "prim/wgmma.cuh"

// Stages of the ring, and the block's shared memory: the ring, two boxes of 16 x 64 of C per warp (real C), 512 bytes of
// barriers. A stage of D=224 has room for four boxes of 64.
EXPORT_FN(hopper_stages, d, d >= 192 ? 4 : 6);
EXPORT_FN(hopper_float_stages, d, d > 192 ? 4 : d == 192 ? 5 : 7);
EXPORT_FN(hopper_stage, d, (128 + (d == 224 ? 256 : d)) * 128);
EXPORT_FN(hopper_shared, d, hopper_stages(d) * hopper_stage(d) + 8 * 2 * 2048 + 512);
EXPORT_FN(hopper_float_shared, d, hopper_float_stages(d) * hopper_stage(d) + 512);

// Blocks that share the k of the tiles that do not fill the last wave: a constant, so that the bits of a gradient do not depend
// on the number of SMs. Each takes at least SPLIT_STEPS steps of 64 k.
EXPORT(int, SPLIT_BLOCKS, 132);
EXPORT(int, SPLIT_STEPS, 8);
// Floats of one block's part of a tile in `parts`.
EXPORT_FN(hopper_part, d, 128 * d);

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int ROWS = 128, DEPTH = 64;  // rows of a tile; k of a stage

// Row i and column j of tile t in a grid of tm x tn tiles.
DEVICE void place(int t, int tm, int tn, int group, int& i, int& j) {
  const int per = group * tn, g = t / per, first = g * group, rest = tm - first;
  const int size = rest < group ? rest : group, r = t - g * per;
  i = first + r % size;
  j = r / size;
}

// The work of a block: whole tiles, then its part of the steps of the split tiles, in `workers` parts of equal size. A block ends
// its part with the first steps of a tile, and the next blocks begin theirs with that tile's other steps: when the block with the
// first steps adds the other parts, they are already there.
struct Work {
  int whole, steps, workers, split_steps, rank, at, to, next_tile;
  DEVICE_MEMBER Work(int tiles, int steps, int workers)
      : whole(workers ? tiles / SPLIT_BLOCKS * SPLIT_BLOCKS : tiles), steps(steps), workers(workers),
        split_steps((tiles - whole) * steps), rank(workers - 1 - (int)blockIdx.x), at(0), to(0), next_tile(blockIdx.x) {
    if (workers && rank >= 0) at = start(rank), to = start(rank + 1);
  }
  DEVICE_MEMBER int start(int r) const { return (int)((long long)split_steps * r / workers); }
  // The next tile, and its range of steps [first, last).
  DEVICE_MEMBER bool next(int& tile, int& first, int& last) {
    if (next_tile < whole) {
      tile = next_tile;
      next_tile += gridDim.x;
      first = 0;
      last = steps;
      return true;
    }
    if (!workers || at >= to) return false;
    tile = whole + at / steps;
    first = at % steps;
    last = first + (to - at) < steps ? first + (to - at) : steps;
    at += last - first;
    return true;
  }
  // The end of the tile in which this part ends: the steps up to there belong to the ranks after this one.
  DEVICE_MEMBER int end_of_tile() const { return (at + steps - 1) / steps * steps; }
};

struct alignas(16) Four {
  float v[4];
};

// Where real C goes: through TMA to `map`, and the columns that fill no box directly to `direct`. R is `residual` or null.
struct RealC {
  const tensor_map* map;
  real* direct;
  const real* residual;
  int ldc, ldr;
};
// Where float C goes, and the parts of split tiles.
struct FloatC {
  float *c, *parts;
  int* flags;
  int ldc, accumulate, workers;
};

// Prefetches into L2 what is added to a consumer's 64 x D of C: 128 bytes per thread and turn.
template <int D, class T>
DEVICE void prefetch_tile(const T* from, int ld, int row0, int col0, int m, int n, int thread) {
  constexpr int WIDTH = 128 / sizeof(T), LINES = (D + WIDTH - 1) / WIDTH;
#pragma unroll
  for (int x = 0; x < LINES / 2; ++x) {
    const int line = thread + x * 128, row = row0 + line / LINES, col = col0 + line % LINES * WIDTH;
    if (row < m && col < n) prefetch_l2(from + (long long)row * ld + col);
  }
}

// A consumer's part of a tile, in the register layout of its threads.
template <int D>
DEVICE Four* part_of(const FloatC& to, int rank, int w, int thread) {
  return (Four*)(to.parts + (long long)rank * hopper_part(D)) + w * 128 + thread;
}
template <int D>
DEVICE void put_part(const FloatC& to, int rank, const float (&d)[D / 2], int w, int thread) {
  Four* part = part_of<D>(to, rank, w, thread);
#pragma unroll
  for (int x = 0; x < D / 8; ++x) part[x * 256] = {d[4 * x], d[4 * x + 1], d[4 * x + 2], d[4 * x + 3]};
  named_barrier(1 + w, 128);
  if (thread == 0) flag_set(to.flags + 2 * rank + w);
}
// Adds the parts of the tile that this block began, in the order of k.
template <int D>
DEVICE void add_parts(const FloatC& to, const Work& work, float (&d)[D / 2], int w, int thread) {
  const int end = work.end_of_tile();
  for (int r = work.rank + 1; r < work.workers && work.start(r) < end; ++r) {
    if (thread == 0) flag_wait(to.flags + 2 * r + w);
    named_barrier(1 + w, 128);
    const Four* part = part_of<D>(to, r, w, thread);
#pragma unroll
    for (int x = 0; x < D / 8; ++x) {
      const Four p = part[x * 256];
#pragma unroll
      for (int e = 0; e < 4; ++e) d[4 * x + e] += p.v[e];
    }
  }
}

// Stores this thread's pairs of float C, loading four at a time so that their latencies overlap.
template <int D>
DEVICE void put_float(const FloatC& to, const float (&d)[D / 2], int row, int col, int m, int n) {
  float* c = to.c + (long long)row * to.ldc + col;
#pragma unroll
  for (int from = 0; from < D / 8; from += 4) {
    Two<float> v[4][2];
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int y = from + x;
        v[x][h] = {0.f, 0.f};
        if (to.accumulate && row + h * 8 < m && col + y * 8 < n) v[x][h] = *(const Two<float>*)(c + (long long)h * 8 * to.ldc + y * 8);
      }
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int y = from + x;
        const Two<float> sum = {v[x][h].x + d[4 * y + 2 * h], v[x][h].y + d[4 * y + 2 * h + 1]};
        if (row + h * 8 < m && col + y * 8 < n)
          *(Two<float>*)(c + (long long)h * 8 * to.ldc + y * 8) = to.accumulate ? sum : Two<float>{d[4 * y + 2 * h], d[4 * y + 2 * h + 1]};
      }
  }
}

// Stores a warp's 16 x D of real C by TMA, 64 columns at a time through one of its two boxes in `out`, so that a warp waits only
// for the box. The last 32 columns of 224 go straight to memory.
template <int D>
DEVICE void put_real(const RealC& to, unsigned char* out, float (&d)[D / 2], int& turn, int lane, int row0, int col0, int m,
                     int n) {
  const int row = row0 + lane / 4, col = col0 + lane % 4 * 2;
#pragma unroll
  for (int from = 0; from < D / 8; from += 8) {  // in units of 8 columns
    constexpr int LEFT = D / 8 % 8;
    const int pairs = from + 8 <= D / 8 ? 8 : LEFT;
    if (to.residual) {
      unsigned r[8][2];
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          r[x][h] = 0;
          if (x < pairs && row + h * 8 < m && col + (from + x) * 8 < n)
            r[x][h] = *(const unsigned*)(to.residual + (long long)(row + h * 8) * to.ldr + col + (from + x) * 8);
        }
#pragma unroll
      for (int x = 0; x < 8; ++x)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (x < pairs) {
            d[4 * (from + x) + 2 * h] += to_float(bf16{(unsigned short)(r[x][h] & 0xffffu)});
            d[4 * (from + x) + 2 * h + 1] += to_float(bf16{(unsigned short)(r[x][h] >> 16)});
          }
    }
    if (pairs == 8) {
      unsigned char* box = out + (turn++ & 1) * 2048;  // turn keeps counting across tiles, whose number of boxes may be odd
      if (lane == 0) tma_wait_read<1>();  // the box used two turns ago has been read
      warp_sync();
#pragma unroll
      for (int x = 0; x < 8; x += 2) {
        // Four 8 x 8 matrices: rows 0 and 8, then the same of the next 8 columns.
        unsigned r[4];
#pragma unroll
        for (int y = 0; y < 4; ++y) r[y] = pack_bf16(d[4 * (from + x) + 2 * y], d[4 * (from + x) + 2 * y + 1]);
        stmatrix4(box + swizzle128(lane / 8 % 2 * 8 + lane % 8, x + lane / 16), r);
      }
      fence_async_proxy();
      warp_sync();
      if (lane == 0) {
        if (col0 + from * 8 < n) tma_store(to.map, box, col0 + from * 8, row0);
        tma_commit();
      }
    } else {
#pragma unroll
      for (int x = 0; x < LEFT; ++x)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (row + h * 8 < m && col + (from + x) * 8 < n)
            *(unsigned*)(to.direct + (long long)(row + h * 8) * to.ldc + col + (from + x) * 8) =
                pack_bf16(d[4 * (from + x) + 2 * h], d[4 * (from + x) + 2 * h + 1]);
    }
  }
}

// The ring, for a kernel that uses it after the product's last tile, too.
struct Ring {
  bf16 *sa, *sb;
  mbarrier *full, *empty;
  int stages, a_size, b_size, stage, phase;
  DEVICE_MEMBER void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};
struct NothingMore {
  DEVICE_MEMBER void load(Ring) const {}
  DEVICE_MEMBER void sum(Ring) const {}
};

// `t` and `low`: the terms after the last step of k. Their operands fill whole boxes: outside the segment's columns and ranks B_i
// is zero. `more` has work for the same ring.
template <int TRANS, int D, bool FLOAT_OUT, class Low = NoLowRank, class More = NothingMore>
DEVICE void hopper_product(const tensor_map& a, const tensor_map& b, const RealC& real_c, const FloatC& float_c, const real* bias,
                           int m, int n, int k, int group, const tensor_map* t = nullptr, const Low& low = {},
                           const More& more = {}) {
  constexpr bool AK = TRANS != TN, BK_CONTIGUOUS = TRANS == NT;
  constexpr int STAGES = FLOAT_OUT ? hopper_float_stages(D) : hopper_stages(D);
  static_assert(hopper_shared(D) <= 227 * 1024 && hopper_float_shared(D) <= 227 * 1024, "what a block of Hopper may have");
  constexpr int WIDTH = hopper_stage(D) / 128 - ROWS;  // room for B in a stage
  constexpr int LOADED = BK_CONTIGUOUS ? D : WIDTH;    // how much of it a load fills
  bf16* sa = (bf16*)shared_base();           // STAGES x 128 x 64
  bf16* sb = sa + STAGES * ROWS * DEPTH;     // STAGES x WIDTH x 64
  bf16* sc = sb + STAGES * WIDTH * DEPTH;    // two boxes of 16 x 64 per warp (real C only)
  mbarrier* full = (mbarrier*)(sc + (FLOAT_OUT ? 0 : 8 * 2 * 16 * 64));
  mbarrier* empty = full + STAGES;
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 2);
    }
    mbarrier_fence();
  }
  block_sync();
  const int tm = (m + ROWS - 1) / ROWS, tn = (n + D - 1) / D;
  Work work(tm * tn, (k + DEPTH - 1) / DEPTH, TRANS == TN ? float_c.workers : 0);  // only gradients may be split
  int stage = 0, phase = 0, tile, first_step, last_step, i, j;
  auto next = [&] {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };

  if (warpgroup == 0) {
    registers_dec<40>();
    if (threadIdx.x != 0) return;
    while (work.next(tile, first_step, last_step)) {
      place(tile, tm, tn, group, i, j);
      for (int q = first_step; q < last_step; ++q, next()) {
        mbarrier_wait(empty + stage, phase ^ 1);
        mbarrier* arrived = full + stage;
        mbarrier_expect(arrived, (ROWS + LOADED) * DEPTH * 2);
        bf16 *ta = sa + stage * ROWS * DEPTH, *tb = sb + stage * WIDTH * DEPTH;
        if (AK)
          tma_load(ta, &a, arrived, q * DEPTH, i * ROWS);
        else
          for (int x = 0; x < ROWS; x += 64) tma_load(ta + x * DEPTH, &a, arrived, i * ROWS + x, q * DEPTH);
        if (BK_CONTIGUOUS)
          tma_load(tb, &b, arrived, q * DEPTH, j * D);
        else
          for (int x = 0; x < WIDTH; x += 64) tma_load(tb + x * DEPTH, &b, arrived, j * D + x, q * DEPTH);
      }
      if constexpr (Low::ANY) {
        LowStep<const tensor_map*> s;
        for (int step = 0; low.step(step, j * D, j * D + D, DEPTH, s); ++step, next()) {
          mbarrier_wait(empty + stage, phase ^ 1);
          mbarrier* arrived = full + stage;
          mbarrier_expect(arrived, (ROWS + LOADED) * DEPTH * 2);  // a box counts whole wherever it lies
          tma_load(sa + stage * ROWS * DEPTH, t, arrived, s.t, i * ROWS);
          bf16* tb = sb + stage * WIDTH * DEPTH;
          if (BK_CONTIGUOUS)
            tma_load(tb, s.b, arrived, s.r, s.at);
          else
            for (int x = 0; x < WIDTH; x += 64) tma_load(tb + x * DEPTH, s.b, arrived, s.at + x, s.r);
        }
      }
    }
    more.load({sa, sb, full, empty, STAGES, ROWS * DEPTH, WIDTH * DEPTH, stage, phase});
    return;
  }

  registers_inc<232>();
  const int w = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  unsigned char* out = (unsigned char*)sc + (w * 4 + warp) * 4096;
  int turn = 0;
  while (work.next(tile, first_step, last_step)) {
    place(tile, tm, tn, group, i, j);
    const int row0 = i * ROWS + w * 64, col0 = j * D;
    float d[D / 2];
    int last = -1;
    for (int q = first_step; q < last_step; ++q, next()) {
      mbarrier_wait(full + stage, phase);
      const bf16 *ta = sa + stage * ROWS * DEPTH + w * 64 * DEPTH, *tb = sb + stage * WIDTH * DEPTH;
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < DEPTH; kk += 16)
        wgmma_ss<D, !AK, !BK_CONTIGUOUS>(d, wgmma_desc<AK>(ta + (AK ? kk : kk * 64)),
                                         wgmma_desc<BK_CONTIGUOUS>(tb + (BK_CONTIGUOUS ? kk : kk * 64)), q > first_step || kk > 0);
      wgmma_commit();
      if (last >= 0) {
        wgmma_wait<1>();
        if (thread == 0) mbarrier_arrive(empty + last);
      }
      last = stage;
      if (q == (last_step > 8 ? last_step - 8 : 0)) {
        if (FLOAT_OUT && float_c.accumulate && first_step == 0)
          prefetch_tile<D>(float_c.c, float_c.ldc, row0, col0, m, n, thread);
        if (!FLOAT_OUT && real_c.residual) prefetch_tile<D>(real_c.residual, real_c.ldr, row0, col0, m, n, thread);
      }
    }
    if constexpr (Low::ANY) {
      LowStep<const tensor_map*> s;
      for (int step = 0; low.step(step, j * D, j * D + D, DEPTH, s); ++step, next()) {
        mbarrier_wait(full + stage, phase);
        const bf16 *ta = sa + stage * ROWS * DEPTH + w * 64 * DEPTH, *tb = sb + stage * WIDTH * DEPTH;
        wgmma_fence();
#pragma unroll 1
        for (int kk = 0; kk < s.ranks && kk < DEPTH; kk += 16)
          wgmma_ss<D, !AK, !BK_CONTIGUOUS>(d, wgmma_desc<AK>(ta + (AK ? kk : kk * 64)),
                                           wgmma_desc<BK_CONTIGUOUS>(tb + (BK_CONTIGUOUS ? kk : kk * 64)), true);
        wgmma_commit();
        wgmma_wait<1>();
        if (thread == 0) mbarrier_arrive(empty + last);
        last = stage;
      }
    }
    wgmma_wait<0>();
    if (thread == 0) mbarrier_arrive(empty + last);

    if (TRANS == TN && first_step > 0) {  // another block has this tile's first steps
      put_part<D>(float_c, work.rank, d, w, thread);
      continue;
    }
    if (TRANS == TN && last_step < work.steps) add_parts<D>(float_c, work, d, w, thread);
    if (bias) {
#pragma unroll
      for (int x = 0; x < D / 8; ++x)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = col0 + x * 8 + lane % 4 * 2 + e;
          const float v = col < n ? to_float(bias[col]) : 0.f;
          d[4 * x + e] += v;
          d[4 * x + 2 + e] += v;
        }
    }
    if (FLOAT_OUT)
      put_float<D>(float_c, d, row0 + warp * 16 + lane / 4, col0 + lane % 4 * 2, m, n);
    else
      put_real<D>(real_c, out, d, turn, lane, row0 + warp * 16, col0, m, n);
  }
  more.sum({sa, sb, full, empty, STAGES, ROWS * DEPTH, WIDTH * DEPTH, stage, phase});
  if (!FLOAT_OUT && lane == 0) tma_wait<0>();
}
#endif
