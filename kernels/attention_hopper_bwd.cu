// Backward of causal attention on sm_90a with wgmma: bf16, head sizes 64 and 128. Math and shapes: attention.cu.
//
// Math     As attention.cu, in base 2: P = 2^(s scale log2(e) - lse log2(e)), one fmaf and one ex2 a score. The factor `scale` of
//          dS is taken out of the sums and applied to dq and dk at the end.
// Shapes   As attention.cu.  items [tiles, 2] int: segment and first row in it, for each 128 rows;  stats [2, heads, stat_rows]
//          float: -lse log2(e), then delta; the rows of segment i begin at its start rounded up to a multiple of 4, + 4 i
// Plan     attention_hopper_dq: one block per SM, which takes tiles of 128 query rows of a head in turn, longest first. It also
//          computes delta from out and dout and writes it to `stats` for the second kernel. attention_hopper_dkv: one block per
//          (128 key rows, kv head), over the heads of the group and the queries that see them. In both, one warpgroup produces
//          (cp.async into a ring of stages with 128-byte swizzle) and two consume, 64 rows each, sharing the ring. dkv computes
//          the scores transposed (keys x queries), so that P and dS are A operands in registers without a way through shared
//          memory. The products of a step overlap the scores of the next where registers allow (dq; dkv at head size 64);
//          otherwise they overlap dS, in halves. No atomics.
// Numerics As attention_mma.cu: sums in float, P and dS rounded to bf16 as operands. Each element is one chain over the steps in
//          an order that depends on the segment alone. Rows outside a segment are zeros: their P may be anything finite. The bits
//          are not those of attention_mma.cu.
// Cost     14 D flops a pair executed, 10 D counted. H100 (2026-11-27), TFLOP/s counted, beside torch 2.11's cuDNN and flash
//          backward:  8 x 2048, 14/2 heads, D 64:  328 (265, 160);  2 x 8192, 16/8 heads, D 128:  476 (478, 274), the latter
//          before dq took turns (docs/kernels.md; with them *predicted* 490).
#include "common/mask.cuh"
#include "prim/async.cuh"
#include "prim/wgmma.cuh"

// Rows per block: 64 for each of its two consumer warpgroups.
EXPORT(int, HOPPER_BWD_ROWS, 128);
// Stages of the rings, each of two tiles of 64 rows: as many as fit.
EXPORT_FN(hopper_dkv_stages, d, d == 64 ? 8 : 5);
EXPORT_FN(hopper_dq_stages, d, d == 64 ? 8 : 4);
// Registers per producer thread; the consumers share the rest of 504.
constexpr int PRODUCER_REGISTERS = 40;
// Bytes of shared memory: the resident tiles of 64 rows (dkv 4, dq 6), the ring (dkv: with 132 floats per stage), the barriers.
EXPORT_FN(hopper_dkv_shared, d, 4 * 64 * d * 2 + hopper_dkv_stages(d) * (2 * 64 * d * 2 + 528) + 144);
EXPORT_FN(hopper_dq_shared, d, 6 * 64 * d * 2 + hopper_dq_stages(d) * 2 * 64 * d * 2 + 144);

#if defined(REAL_BF16) && HOPPER
constexpr float LOG2_E = 1.44269504f;

// Position in the ring: the stage, and the parity of its phase.
struct Turn {
  int stage, parity;
  template <int STAGES>
  DEVICE_MEMBER void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// 128 threads start the copy of 64 rows of D values, as boxes of 64 columns with the 128-byte swizzle. Row i is read from from +
// i ld; rows from `count` on are zero.
template <int D>
DEVICE void fetch_box(bf16* tile, const bf16* from, int ld, int count) {
  const int t = threadIdx.x % 128, chunk = t % 8, first = t / 8;
  bf16* to = tile + first * 64 + (chunk ^ (first % 8)) * 8;
  const bf16* row = from + (long long)first * ld + chunk * 8;
#pragma unroll
  for (int i = 0; i < 64; i += 16) {
    const bool there = first + i < count;
    const bf16* at = there ? row : from;
#pragma unroll
    for (int b = 0; b < D; b += 64) copy_async16(to + i * 64 + b * 64, at + b, there ? 16 : 0);
    row += 16 * (long long)ld;
  }
}

// The same for the keys of the positions from `block` on, which may lie in two places, and for their values, `values` further on.
template <int D>
DEVICE void fetch_keys(bf16* tile, const bf16* k, int values, const SegmentKeys& keys, int block, int to) {
  const int t = threadIdx.x % 128, chunk = t % 8, first = t / 8;
  bf16* to_tile = tile + first * 64 + (chunk ^ (first % 8)) * 8;
#pragma unroll
  for (int i = 0; i < 64; i += 16) {
    const int position = block + first + i;
    const bool there = position < to;
    const bf16* at = k + (there ? keys.at(position) + chunk * 8 : 0);
#pragma unroll
    for (int b = 0; b < D; b += 64) {
      copy_async16(to_tile + i * 64 + b * 64, at + b, there ? 16 : 0);
      copy_async16(to_tile + 64 * D + i * 64 + b * 64, at + values + b, there ? 16 : 0);
    }
  }
}

// Stages in flight when the producer waits for the oldest. A consumer holds two stages, that of its step and the previous one:
// with two of four in flight the next would be published only after a consumer had released one.
template <int STAGES>
constexpr int AHEAD_OF = STAGES > 4 ? 2 : 1;
// Floats stored with each stage of dkv, and the position that marks the end.
constexpr int NOTES = 132, END = -1;

// The producer's side of a barrier: all but the newest LEFT groups of this thread's copies have landed, and wgmma may read them.
template <int LEFT>
DEVICE void publish(mbarrier* barrier) {
  copy_wait<LEFT>();
  fence_async_proxy();
  warp_sync();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// acc = A B^T: 64 rows of A and 64 of B, D columns.
template <int D>
DEVICE void score_products(float (&acc)[32], const bf16* a, const bf16* b) {
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    const int at = k / 64 * 64 * 64 + k % 64;
    wgmma_ss<64, false, false>(acc, wgmma_desc<true>(a + at), wgmma_desc<true>(b + at), k > 0);
  }
}

// The A operand that stays for all steps. COPIED: kept in registers, which saves a third of the shared memory reads; otherwise
// read from shared memory.
template <int D, bool COPIED>
struct Resident {
  const bf16* tile;
  DEVICE_MEMBER explicit Resident(const bf16* tile) : tile(tile) {}
  DEVICE_MEMBER void scores(float (&acc)[32], const bf16* b) const { score_products<D>(acc, tile, b); }
};
template <int D>
struct Resident<D, true> {
  unsigned a[D / 16][4];
  DEVICE_MEMBER explicit Resident(const bf16* tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ldmatrix4<false>(a[k], tile + row * 64 + ((2 * k + lane / 16) ^ (row % 8)) * 8);
  }
  DEVICE_MEMBER void scores(float (&acc)[32], const bf16* b) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) wgmma_rs<64, false>(acc, a[k], wgmma_desc<true>(b + k * 16), k > 0);
  }
};

// acc += W B: W is 64 x 64, packed; B has 64 rows of D columns.
template <int D>
DEVICE void weighted_rows(float (&acc)[D / 2], const unsigned (&w)[4][4], const bf16* b, int from = 0, int to = 4) {
#pragma unroll
  for (int k = from; k < to; ++k) wgmma_rs<D, true>(acc, w[k], wgmma_desc<false>(b + k * 16 * 64), true);
}

DEVICE void clear(unsigned (&w)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) w[k][i] = 0;
}

// Where the stats of a segment begin in a row of `stats`: at a multiple of four, for 16-byte copies.
DEVICE int stats_of(const int* segments, int segment) { return (segments[segment * SEGMENT_INTS] + 3) / 4 * 4 + segment * 4; }

// Stores two neighbouring values of a gradient.
DEVICE void store_pair(bf16* to, float a, float b, int accumulate) {
  if (accumulate) {
    const unsigned old = *(const unsigned*)to;
    a += bits_to_float((int)(old << 16));
    b += bits_to_float((int)(old & 0xffff0000u));
  }
  *(unsigned*)to = pack_bf16(a, b);
}

// The value kept of s = q.k: P, or with a softcap its tanh, from which P and the slope are computed twice: registers are scarcer
// than exponentials.
template <bool CAPPED>
DEVICE float kept(float s, float nlse, float scale, float softcap) {
  return CAPPED ? tanh_f(s * scale / softcap) : exp2_fast(fmaf(s, scale * LOG2_E, nlse));
}
// The kept value of a score that is masked: lower than any tanh, so its P is 0.
template <bool CAPPED>
constexpr float UNSEEN = CAPPED ? -1e15f : 0.f;
template <bool CAPPED>
DEVICE float weight(float s, float nlse, float softcap) {
  return CAPPED ? exp2_fast(fmaf(softcap * s, LOG2_E, nlse)) : s;
}
// The gradient of q.k, without the factor `scale`.
template <bool CAPPED>
DEVICE float gradient(float s, float dp, float nlse, float delta, float softcap) {
  const float x = weight<CAPPED>(s, nlse, softcap) * (dp - delta);
  return CAPPED ? x * fmaf(-s, s, 1.f) : x;
}

// dk and dv of 128 keys of a segment.
template <int D, bool CAPPED>
DEVICE void key_gradients(real* dqkv, const real* dout, const real* qkv, const float* stats, const int* segments,
                          const int* children, int segment, int first, int kv_head, int stat_rows, int ld, int heads, int kv_heads,
                          float scale, float softcap, int window, int accumulate) {
  constexpr int TILE = 64 * D, STAGES = hopper_dkv_stages(D), AHEAD = AHEAD_OF<STAGES>;
  // Whether the products of a step overlap the scores of the next: only where registers allow.
  constexpr bool OVERLAP = D == 64 && !CAPPED;
  bf16* sk = (bf16*)shared_base();
  bf16* sv = sk + 2 * TILE;
  bf16* ring = sv + 2 * TILE;  // per stage: queries, then the gradients of their outputs
  float* notes = (float*)(ring + STAGES * 2 * TILE);  // per stage: 64 times -lse in base 2, 64 times delta, the position
  mbarrier* full = (mbarrier*)(notes + STAGES * NOTES);
  mbarrier* empty = full + STAGES;
  mbarrier* resident = empty + STAGES;
  const int group = heads / kv_heads, warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int* mine = segments + segment * SEGMENT_INTS;
  const int count = min_int(mine[1] - first, HOPPER_BWD_ROWS), first_position = mine[3] + first, start = mine[0] + first;
  const long long column = (long long)(heads + kv_head) * D;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 4);
      mbarrier_init(empty + i, 2);
    }
    mbarrier_init(resident, 4);
    mbarrier_fence();
  }
  block_sync();
  // Calls f(first row, its position, its place in stats, rows, head) for each 64 queries that see a key of the block. Only the
  // producer walks; the consumers read the position from the stage, which saves registers.
  auto each_step = [&](auto f) {
    for (int c = mine[4] - 1; c < mine[5]; ++c) {
      const int index = c < mine[4] ? segment : children[c];
      const int* user = segments + index * SEGMENT_INTS;
      const int user_start = user[0], user_position = user[3], user_stats = stats_of(segments, index);
      const long long reach = (long long)first_position + count - 1 + window - user_position;
      const int to = reach < user[1] ? (int)reach : user[1];
      for (int g = 0; g < group; ++g)
        for (int block = index == segment ? first : 0; block < to; block += 64)
          f(user_start + block, user_position + block, user_stats + block, to - block, kv_head * group + g);
    }
  };
  Turn turn = {0, 0};
  if (warpgroup == 2) {
    registers_dec<PRODUCER_REGISTERS>();
    const int t = threadIdx.x % 128;
    const real* key_row = qkv + (long long)start * ld + column;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      if (w * 64 >= count) break;
      const real* from = key_row + w * 64 * (long long)ld;
      fetch_box<D>(sk + w * TILE, from, ld, count - w * 64);
      fetch_box<D>(sv + w * TILE, from + kv_heads * D, ld, count - w * 64);
    }
    copy_commit();
    publish<0>(resident);
    int issued = 0;
    auto pass = [&]() {
      copy_commit();
      if (++issued > AHEAD) publish<AHEAD>(full + (turn.stage + STAGES - AHEAD) % STAGES);
      turn.next<STAGES>();
    };
    each_step([&](int row, int position, int stat, int left, int head) {
      mbarrier_wait(empty + turn.stage, turn.parity ^ 1);
      bf16* to = ring + turn.stage * 2 * TILE;
      fetch_box<D>(to, qkv + (long long)row * ld + head * D, ld, left);
      fetch_box<D>(to + TILE, dout + ((long long)row * heads + head) * D, heads * D, left);
      if (t < 32) {  // 64 times -lse, then 64 times delta
        const int i = t % 16 * 4;
        const float* from = stats + ((long long)(t / 16 * heads + head)) * stat_rows + stat;
        copy_async16(notes + turn.stage * NOTES + t * 4, from + (i < left ? i : 0), min_int(max_int(left - i, 0), 4) * 4);
      }
      if (t == 0) *(int*)(notes + turn.stage * NOTES + 128) = position;
      pass();
    });
    mbarrier_wait(empty + turn.stage, turn.parity ^ 1);
    if (t == 0) *(int*)(notes + turn.stage * NOTES + 128) = END;
    pass();
    for (int i = min_int(issued, AHEAD); i > 0; --i) publish<0>(full + (turn.stage + STAGES - i) % STAGES);
    return;
  }
  registers_inc<(504 - PRODUCER_REGISTERS) / 2>();
  const int w = shfl(warpgroup, 0), low_key = first_position + w * 64, high_key = low_key + 63;
  const int key = low_key + warp * 16 + lane / 4;  // and key + 8
  const bool leader = threadIdx.x % 128 == 0;
  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;
  unsigned p[4][4], ds[4][4];
  int pending = -1;  // the stage of p and ds, whose products are still to be started
  clear(p);
  clear(ds);
  auto products = [&](int stage) {
    const bf16* q = ring + stage * 2 * TILE;
    weighted_rows<D>(dv, p, q + TILE);
    weighted_rows<D>(dk, ds, q);
  };
  auto finish = [&]() {
    if (pending < 0) return;
    wgmma_fence();
    products(pending);
    wgmma_commit();
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(empty + pending);
    pending = -1;
    clear(p);
    clear(ds);
  };
  mbarrier_wait(resident, 0);
  // ptxas 13.0 reuses the registers of copied operands inside this loop where P and dS do not outlive a step (the first GPU run
  // of a softcap found it), so operands are copied with OVERLAP only.
  const Resident<D, OVERLAP> keys(sk + w * TILE), values(sv + w * TILE);
  for (;;) {
    const int stage = shfl(turn.stage, 0);  // uniform: a descriptor must be
    mbarrier_wait(full + stage, turn.parity);
    turn.next<STAGES>();
    const float* note = notes + stage * NOTES;
    const int position = *(const int*)(note + 128);
    if (position == END) break;
    if (w * 64 >= count || position + 63 < low_key || first_seen(position, window) > high_key) {  // sees none of these keys
      finish();
      named_barrier(1 + w, 128);  // no product keeps the warps together here: wait until all have read the stage
      if (leader) mbarrier_arrive(empty + stage);
      continue;
    }
    const bf16 *q = ring + stage * 2 * TILE, *go = q + TILE;
    const float* nlse = note + lane % 4 * 2;
    float s[32], dp[32];
    wgmma_fence();
    keys.scores(s, q);
    wgmma_commit();
    values.scores(dp, go);
    wgmma_commit();
    if (OVERLAP) products(shfl(pending < 0 ? stage : pending, 0));  // the first time with zeros: a branch would serialise
    wgmma_commit();
    wgmma_wait<2>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float a = nlse[j * 8], b = nlse[j * 8 + 1];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 * j + 2 * h;
        s[i] = kept<CAPPED>(s[i], a, scale, softcap);
        s[i + 1] = kept<CAPPED>(s[i + 1], b, scale, softcap);
      }
    }
    if (position < high_key || first_seen(position + 63, window) > low_key) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Key t is seen by the positions [t, t + window).
        const int low = key + h * 8 - position - lane % 4 * 2, high = low + min_int(window, 1 << 30);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (j * 8 + e < low || j * 8 + e >= high) s[4 * j + 2 * h + e] = UNSEEN<CAPPED>;
      }
    }
    wgmma_wait<0>();
    if (OVERLAP) {
      if (leader && pending >= 0) mbarrier_arrive(empty + pending);
      pending = stage;
    }
    auto pack_p = [&](int from, int to) {
#pragma unroll
      for (int j = 2 * from; j < 2 * to; ++j) {
        const float x = nlse[j * 8], y = nlse[j * 8 + 1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * j + 2 * h;
          p[j / 2][j % 2 * 2 + h] = pack_bf16(weight<CAPPED>(s[i], x, softcap), weight<CAPPED>(s[i + 1], y, softcap));
        }
      }
    };
    auto pack_ds = [&](int from, int to) {
#pragma unroll
      for (int j = 2 * from; j < 2 * to; ++j) {
        const float x = nlse[j * 8], y = nlse[j * 8 + 1], a = nlse[64 + j * 8], b = nlse[64 + j * 8 + 1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * j + 2 * h;
          ds[j / 2][j % 2 * 2 + h] = pack_bf16(gradient<CAPPED>(s[i], dp[i], x, a, softcap),
                                               gradient<CAPPED>(s[i + 1], dp[i + 1], y, b, softcap));
        }
      }
    };
    if (OVERLAP) {
      pack_p(0, 4);
      pack_ds(0, 4);
    } else {
      // In halves: dV of a half overlaps dS of the same half; there are just enough registers for its P.
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        pack_p(half, half + 2);
        wgmma_fence();
        weighted_rows<D>(dv, p, go, half, half + 2);
        wgmma_commit();
        pack_ds(half, half + 2);
        wgmma_fence();
        weighted_rows<D>(dk, ds, q, half, half + 2);
        wgmma_commit();
      }
      wgmma_wait<0>();
      if (leader) mbarrier_arrive(empty + stage);
    }
  }
  finish();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = w * 64 + warp * 16 + lane / 4 + h * 8;
    if (i >= count) continue;
    real* to = dqkv + (long long)(start + i) * ld + column + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      store_pair(to + j * 8, dk[4 * j + 2 * h] * scale, dk[4 * j + 2 * h + 1] * scale, accumulate);
      store_pair(to + kv_heads * D + j * 8, dv[4 * j + 2 * h], dv[4 * j + 2 * h + 1], accumulate);
    }
  }
}

// delta of row r in tiles of 64 rows: the sum over D of out dout. The four lanes of a row share the work.
template <int D>
DEVICE float row_delta(const bf16* out, const bf16* go, int r) {
  const int lane = threadIdx.x % 4;
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < D / 8; c += 4) {
    const int at = c / 8 * 64 * 64 + r * 64 + (((c % 8 + lane) ^ (r % 8)) * 8);
    const Pack<8> x = load<8>(out + at, 8), y = load<8>(go + at, 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x.v[i], y.v[i], sum);
  }
  sum += shfl_xor(sum, 1);
  return sum + shfl_xor(sum, 2);
}

// 128 query rows of one head, the `index`-th in the order of `items`.
struct QueryTile {
  SegmentKeys keys;
  int segment, first, head, count, first_position;
  DEVICE_MEMBER QueryTile(const int* items, const int* segments, int index, int heads, int ld)
      : keys(segments, items[index / heads * 2], ld), segment(items[index / heads * 2]), first(items[index / heads * 2 + 1]),
        head(index % heads) {
    count = min_int(segments[segment * SEGMENT_INTS + 1] - first, HOPPER_BWD_ROWS);
    first_position = keys.prefix_length + first;
  }
  DEVICE_MEMBER int start() const { return keys.start + first; }
  DEVICE_MEMBER int from(int window) const { return first_seen(first_position, window) / 64 * 64; }
  DEVICE_MEMBER int to() const { return first_position + count; }
};

// The tile of this block's n-th turn. Odd turns go in reverse order, so that no block has the longest tile of every turn.
DEVICE int turn_index(int n) {
  return n * (int)gridDim.x + (int)(n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// The q columns of dqkv for every gridDim.x-th tile.
template <int D, bool CAPPED>
DEVICE void query_gradients(real* dqkv, float* stats, const real* dout, const real* qkv, const real* out, const float* lse,
                            const int* items, const int* segments, int tiles, int stat_rows, int ld, int heads, int kv_heads,
                            float scale, float softcap, int window, int accumulate) {
  constexpr int TILE = 64 * D, STAGES = hopper_dq_stages(D), AHEAD = AHEAD_OF<STAGES>;
  constexpr bool COPIED = D == 64;
  bf16* sq = (bf16*)shared_base();
  bf16* sgo = sq + 2 * TILE;
  bf16* sout = sgo + 2 * TILE;
  bf16* ring = sout + 2 * TILE;  // per stage: keys, then values
  mbarrier* full = (mbarrier*)(ring + STAGES * 2 * TILE);
  mbarrier* empty = full + STAGES;
  mbarrier* resident = empty + STAGES;  // q, dout and out of a tile have arrived
  mbarrier* vacant = resident + 1;      // their place is free for the next tile
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 4);
      mbarrier_init(empty + i, 2);
    }
    mbarrier_init(resident, 4);
    mbarrier_init(vacant, 8);
    mbarrier_fence();
  }
  block_sync();
  Turn turn = {0, 0};
  if (warpgroup == 2) {
    registers_dec<PRODUCER_REGISTERS>();
    for (int n = 0; turn_index(n) < tiles * heads; ++n) {
      const QueryTile tile(items, segments, turn_index(n), heads, ld);
      const int head = tile.head, start = tile.start(), count = tile.count, to = tile.to();
      const long long out_row = ((long long)start * heads + head) * D;
      mbarrier_wait(vacant, (n & 1) ^ 1);
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        if (w * 64 >= count) break;
        const long long at = out_row + w * 64 * (long long)heads * D;
        fetch_box<D>(sq + w * TILE, qkv + (start + w * 64) * (long long)ld + head * D, ld, count - w * 64);
        fetch_box<D>(sgo + w * TILE, dout + at, heads * D, count - w * 64);
        fetch_box<D>(sout + w * TILE, out + at, heads * D, count - w * 64);
      }
      copy_commit();
      const real* k = qkv + (heads + head / (heads / kv_heads)) * D;
      int issued = 0;
      for (int block = tile.from(window); block < to; block += 64) {
        mbarrier_wait(empty + turn.stage, turn.parity ^ 1);
        fetch_keys<D>(ring + turn.stage * 2 * TILE, k, kv_heads * D, tile.keys, block, to);
        copy_commit();
        if (issued == 0) publish<1>(resident);
        if (++issued > AHEAD) publish<AHEAD>(full + (turn.stage + STAGES - AHEAD) % STAGES);
        turn.next<STAGES>();
      }
      // Publish everything before the wait for a vacant place: the consumers need these stages to vacate it.
      for (int i = min_int(issued, AHEAD); i > 0; --i) publish<0>(full + (turn.stage + STAGES - i) % STAGES);
    }
    return;
  }
  registers_inc<(504 - PRODUCER_REGISTERS) / 2>();
  const int w = shfl(warpgroup, 0), r = warp * 16 + lane / 4;
  const bool leader = threadIdx.x % 128 == 0;
  float nlse[2], delta[2], dq[D / 2];
  unsigned ds[4][4];
  int pending = -1;  // the stage of ds, whose product is still to be started
  auto vacate = [&]() {
    warp_sync();
    if (lane == 0) mbarrier_arrive(vacant);
  };
  auto finish = [&]() {
    if (pending < 0) return;
    wgmma_fence();
    weighted_rows<D>(dq, ds, ring + pending * 2 * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    if (leader) mbarrier_arrive(empty + pending);
    pending = -1;
    clear(ds);
  };
  clear(ds);
  QueryTile next(items, segments, turn_index(0), heads, ld);
  for (int n = 0; turn_index(n) < tiles * heads; ++n) {
    const QueryTile tile = next;
    const int count = tile.count, to = tile.to(), low_row = tile.first_position + w * 64, high_row = low_row + 63;
    // Long before its use: the loads depend on each other.
    next = QueryTile(items, segments, min_int(turn_index(n + 1), tiles * heads - 1), heads, ld);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = w * 64 + r + h * 8;
      nlse[h] = i < count ? -lse[(long long)(tile.start() + i) * heads + tile.head] * LOG2_E : NEG_INF;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dq[i] = 0.f;
    mbarrier_wait(resident, n & 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = w * 64 + r + h * 8;
      delta[h] = row_delta<D>(sout + w * TILE, sgo + w * TILE, r + h * 8);
      if (i < count && lane % 4 == 0) {
        float* to_stats = stats + (long long)tile.head * stat_rows + stats_of(segments, tile.segment) + tile.first + i;
        to_stats[0] = nlse[h];
        to_stats[(long long)heads * stat_rows] = delta[h];
      }
    }
    const Resident<D, COPIED> queries(sq + w * TILE), gradients(sgo + w * TILE);
    if (COPIED) vacate();
    for (int block = tile.from(window); block < to; block += 64) {
      const int stage = shfl(turn.stage, 0);  // uniform: a descriptor must be
      mbarrier_wait(full + stage, turn.parity);
      turn.next<STAGES>();
      if (w * 64 >= count || block > high_row || block + 63 < first_seen(low_row, window)) {  // its rows see none of these
        finish();
        named_barrier(1 + w, 128);  // no product keeps the warps together here: wait until all have seen the stage
        if (leader) mbarrier_arrive(empty + stage);
        continue;
      }
      const bf16 *k = ring + stage * 2 * TILE, *v = k + TILE;
      float s[32], dp[32];
      wgmma_fence();
      queries.scores(s, k);
      wgmma_commit();
      gradients.scores(dp, v);
      wgmma_commit();
      weighted_rows<D>(dq, ds, ring + shfl(pending < 0 ? stage : pending, 0) * 2 * TILE);  // the first time with zeros
      wgmma_commit();
      wgmma_wait<2>();
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] = kept<CAPPED>(s[i], nlse[i / 2 % 2], scale, softcap);
      if (block + 63 > low_row || block < first_seen(high_row, window)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int position = low_row + r + h * 8, at = block + lane % 4 * 2;
          const int low = first_seen(position, window) - at, high = position - at;
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (j * 8 + e < low || j * 8 + e > high) s[4 * j + 2 * h + e] = UNSEEN<CAPPED>;
        }
      }
      wgmma_wait<0>();
      if (leader && pending >= 0) mbarrier_arrive(empty + pending);
      pending = stage;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * j + 2 * h;
          ds[j / 2][j % 2 * 2 + h] =
              pack_bf16(gradient<CAPPED>(s[i], dp[i], nlse[h], delta[h], softcap),
                        gradient<CAPPED>(s[i + 1], dp[i + 1], nlse[h], delta[h], softcap));
        }
    }
    if (!COPIED) vacate();
    finish();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = w * 64 + r + h * 8;
      if (i >= count) continue;
      real* row = dqkv + (long long)(tile.start() + i) * ld + tile.head * D + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        store_pair(row + j * 8, dq[4 * j + 2 * h] * scale, dq[4 * j + 2 * h + 1] * scale, accumulate);
    }
  }
}
#endif

// The q columns of dqkv, and `stats` [2, heads, stat_rows]: -lse in base 2, and delta.
KERNEL(attention_hopper_dq, D=64,128, THREADS=384, BLOCKS=1, SHARED=hopper_dq_shared(D), HOT)
(INOUT(real) dqkv, float* stats, const real* dout, const real* qkv, const real* out, const float* lse, const int* items,
 const int* segments, int tiles, int stat_rows, int ld, int heads, int kv_heads, float scale, float softcap, int window,
 int accumulate) {
#if defined(REAL_BF16) && HOPPER
  if (softcap > 0.f)
    query_gradients<D, true>(dqkv, stats, dout, qkv, out, lse, items, segments, tiles, stat_rows, ld, heads, kv_heads,
                             scale, softcap, window, accumulate);
  else
    query_gradients<D, false>(dqkv, stats, dout, qkv, out, lse, items, segments, tiles, stat_rows, ld, heads, kv_heads,
                              scale, softcap, window, accumulate);
#endif
}

// The k and v columns of dqkv for 128 rows of one kv head.
KERNEL(attention_hopper_dkv, D=64,128, THREADS=384, BLOCKS=1, SHARED=hopper_dkv_shared(D), HOT)
(INOUT(real) dqkv, const real* dout, const real* qkv, const float* stats, const int* items, const int* segments,
 const int* children, int stat_rows, int ld, int heads, int kv_heads, float scale, float softcap, int window, int accumulate) {
#if defined(REAL_BF16) && HOPPER
  const int kv_head = blockIdx.x % kv_heads, tile = blockIdx.x / kv_heads;
  const int segment = items[2 * tile], first = items[2 * tile + 1];
  if (softcap > 0.f)
    key_gradients<D, true>(dqkv, dout, qkv, stats, segments, children, segment, first, kv_head, stat_rows, ld, heads, kv_heads,
                           scale, softcap, window, accumulate);
  else
    key_gradients<D, false>(dqkv, dout, qkv, stats, segments, children, segment, first, kv_head, stat_rows, ld, heads, kv_heads,
                            scale, softcap, window, accumulate);
#endif
}
