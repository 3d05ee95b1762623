// Causal attention over packed sequences, forward, with TMA and wgmma: bf16, sm_90a, head sizes 64 and 128. Math: attention.cu.
//
// Math     As attention_mma.cu, with the same softmax code
// Shapes   As attention_mma_fwd, but items are of hopper_fwd_rows(D) rows;  map: boxes of 64 x 64 of qkv
// Plan     One block per (128 or 192 query rows, head). A warpgroup owns 64 of the rows and skips the blocks of 64 positions that
//          none of them sees. K and V pass through a ring of such blocks in shared memory, filled by TMA, or by cp.async where a
//          block is not one box: where a prefix ends inside it, and at the end of the segment (so that no NaN of a neighbour is
//          read). Head size 64: two warpgroups, the first of which also fills the ring; registers allow two blocks per SM. Head
//          size 128: three warpgroups and a fourth that only fills the ring; one block per SM. S of a block is started before the
//          product of P and V of the previous block, which runs during the softmax.
// Numerics Bit for bit those of attention_mma_fwd: wgmma accumulates like a chain of mma.sync, the accumulators lie in the same
//          lanes, and blocks and softmax are the same
// Cost     4 D flops a pair. H100 80GB, 2026-11-27, causal, this file compiled alone: 8 x 2048, 14/2 heads of 64: 374 TFLOP/s
//          (cuDNN 362 to 367, FlashAttention-2 237 to 243); 2 x 8192, 16/8 heads of 128: 641 (580 to 616, 318 to 320). Since
//          two waits were added against a race (see `skip` and `fill`): 347 at 112 heads of 2048, head size 128 unmeasured.
#include "common/online_softmax.cuh"
#include "prim/wgmma_loop.cuh"

// Query rows per block, and stages of its ring.
EXPORT_FN(hopper_fwd_rows, d, d <= 64 ? 128 : 192);
EXPORT_FN(hopper_fwd_stages, d, d <= 64 ? 5 : 4);
// Bytes of shared memory: Q, the ring of K and V, two mbarriers per stage.
EXPORT_FN(hopper_fwd_shared, d, (hopper_fwd_rows(d) + 2 * 64 * hopper_fwd_stages(d)) * d * 2 + 16 * hopper_fwd_stages(d));

#if HOPPER && defined(REAL_BF16)
constexpr int SIDE = 64;           // rows of a tile: a warpgroup's queries, or a block's keys
constexpr int BOX = SIDE * 64;     // values of a box; a tile of D columns is D / 64 boxes
constexpr int GROUP = 128;         // threads of a warpgroup

// Starts the copy of a tile of D columns by a warpgroup. Row i is read from base + offset(i), and is zero where offset(i) is
// negative. Not unrolled: the addresses would take the registers that the products need.
template <int D, class Offset>
DEVICE void fetch_tile(bf16* tile, const bf16* base, const Offset& offset) {
  constexpr int CHUNKS = D / 8;
  const int t = (int)threadIdx.x % GROUP, c = t % CHUNKS;
#pragma unroll 1
  for (int i = 0; i < SIDE * CHUNKS / GROUP; ++i) {
    const int r = t / CHUNKS + i * (GROUP / CHUNKS);
    const long long at = offset(r);
    bf16* to = tile + c / 8 * BOX + swizzle128(r, c % 8) / 2;
    copy_async16(to, base + (at < 0 ? 0 : at + c * 8), at < 0 ? 0 : 16);
  }
}

// Starts s = Q K^T.
template <int D>
DEVICE void start_scores(float (&s)[SIDE / 8][4], wgmma_operand q, wgmma_operand k) {
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    const int at = kk / 4 * BOX + kk % 4 * 16;
    wgmma_ss<SIDE, false, false>((float (&)[SIDE / 2])s, wgmma_step(q, at), wgmma_step(k, at), kk > 0);
  }
  wgmma_commit();
}

// Starts o += P V.
template <int D>
DEVICE void start_weighted(float (&o)[D / 8][4], const unsigned (&p)[SIDE / 16][4], wgmma_operand v) {
#pragma unroll
  for (int kk = 0; kk < SIDE / 16; ++kk)
    wgmma_rs<D, true>((float (&)[D / 2])o, p[kk], wgmma_step(v, kk * 16 * 64), true);
  wgmma_commit();
}

DEVICE void pack_weights(unsigned (&p)[SIDE / 16][4], const float (&s)[SIDE / 8][4]) {
#pragma unroll
  for (int j = 0; j < SIDE / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) p[j / 2][j % 2 * 2 + h] = pack_bf16(s[j][2 * h], s[j][2 * h + 1]);
}

// The ring of K and V. One warpgroup fills it and all empty it, each at its own stage.
template <int D>
struct Ring {
  static constexpr int STAGES = hopper_fwd_stages(D), TILE = SIDE * D;
  bf16 *k, *v;
  mbarrier *full, *empty;
  int stage = 0, phase = 0, before = 0;
  int fill_stage = 0, fill_phase = 1;  // the stages of a new ring are free
  DEVICE_MEMBER Ring(bf16* base) : k(base), v(base + STAGES * TILE), full((mbarrier*)(v + STAGES * TILE)), empty(full + STAGES) {}
  DEVICE_MEMBER void init(int consumers) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, consumers);
    }
    mbarrier_fence();
  }
  DEVICE_MEMBER void wait() { mbarrier_wait(full + stage, phase); }
  DEVICE_MEMBER void release(int which) {
    if (threadIdx.x % GROUP == 0) mbarrier_arrive(empty + which);
  }
  DEVICE_MEMBER void advance() {
    before = stage;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <int D, bool CAPPED>
DEVICE void hopper_forward(real* out, float* lse, const real* qkv, const tensor_map& map, const int* items, const int* segments,
                           int ld, int heads, int kv_heads, float scale, float softcap, int window) {
  constexpr int ROWS = hopper_fwd_rows(D), CONSUMERS = ROWS / SIDE, TILE = SIDE * D, STAGES = Ring<D>::STAGES;
  constexpr bool PRODUCER = D > 64;  // a separate warpgroup fills the ring
  bf16* sq = (bf16*)shared_base();
  Ring<D> ring(sq + ROWS * D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wg = shfl(warp / 4, 0);
  const int head = blockIdx.x % heads, tile = blockIdx.x / heads;
  const int segment = items[2 * tile], tile_row = items[2 * tile + 1];
  const SegmentKeys keys(segments, segment, ld);
  const int length = segments[segment * SEGMENT_INTS + 1], end = keys.prefix_length + length;
  const int to = min_int(keys.prefix_length + tile_row + ROWS, end);
  const int k_column = (heads + head / (heads / kv_heads)) * D, v_column = k_column + kv_heads * D;
  // This warpgroup's rows (perhaps none), and its blocks among those of the tile.
  const int first_row = tile_row + wg * SIDE, count = min_int(length - first_row, SIDE);
  const int first_position = keys.prefix_length + first_row, first_block = first_seen(keys.prefix_length + tile_row, window) / SIDE,
            end_block = (to + SIDE - 1) / SIDE;
  const int my_first = count > 0 ? first_seen(first_position, window) / SIDE : end_block;
  const int my_end = count > 0 ? (first_position + count + SIDE - 1) / SIDE : end_block;

  if (threadIdx.x == 0) ring.init(CONSUMERS);
  block_sync();

  // Starts the copy of a block once all consumers have released its stage; all threads of one warpgroup call it. Every thread of
  // a producer warpgroup waits for every stage: a thread that ran ahead could mistake one phase for the one two turns later.
  auto fill = [&](int block) {
    if (block >= end_block) return;
    const bool leader = threadIdx.x % GROUP == 0;
    const int p = block * SIDE, stage = ring.fill_stage;
    bf16 *to_k = ring.k + stage * TILE, *to_v = ring.v + stage * TILE;
    const bool one_box = p + SIDE <= end && (p >= keys.prefix_length || p + SIDE <= keys.prefix_length);
    if (PRODUCER || !one_box || leader) mbarrier_wait(ring.empty + stage, ring.fill_phase);
    if (one_box) {
      if (leader) {
        mbarrier_expect(ring.full + stage, 2 * TILE * (int)sizeof(bf16));
#pragma unroll
        for (int c = 0; c < D / 64; ++c) {
          tma_load(to_k + c * BOX, &map, ring.full + stage, k_column + c * 64, keys.row(p));
          tma_load(to_v + c * BOX, &map, ring.full + stage, v_column + c * 64, keys.row(p));
        }
      }
    } else {
      auto key_row = [&](int i) { return p + i < to ? keys.at(p + i) : -1ll; };
      fetch_tile<D>(to_k, qkv + k_column, key_row);
      fetch_tile<D>(to_v, qkv + v_column, key_row);
      copy_commit();
      copy_wait<0>();
      fence_async_proxy();
      named_barrier(1, GROUP);
      if (leader) mbarrier_arrive(ring.full + stage);
    }
    if (++ring.fill_stage == STAGES) ring.fill_stage = 0, ring.fill_phase ^= 1;
  };
  if (PRODUCER && wg == CONSUMERS) {
    registers_dec<32>();
#pragma unroll 1
    for (int block = first_block; block < end_block; ++block) fill(block);
  } else {
    if (PRODUCER) registers_inc<160>();
    // Without a producer: at block b the first warpgroup has finished b - 2, and refills that stage with b - 2 + STAGES once the
    // others have finished it too.
    auto fill_ahead = [&](int block) {
      if (!PRODUCER && wg == 0) fill(block - 2 + STAGES);
    };
    fetch_tile<D>(sq + wg * TILE, qkv + head * D,
                  [&](int i) { return i < count ? (long long)(keys.start + first_row + i) * ld : -1ll; });
    copy_commit();
    for (int i = 0; i < STAGES - 2; ++i) fill_ahead(first_block + i + 2 - STAGES);
    copy_wait<0>();
    fence_async_proxy();
    named_barrier(2 + wg, GROUP);  // a warpgroup reads only its own rows of Q

    const wgmma_operand q = wgmma_desc<true>(sq + wg * TILE), k0 = wgmma_desc<true>(ring.k), v0 = wgmma_desc<false>(ring.v);
    const float factor = score_factor(scale, softcap);
    OnlineSoftmax softmax;
    float o[D / 8][4], s[SIDE / 8][4], alpha[2];
    unsigned p[SIDE / 16][4];
    int position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = warp % 4 * 16 + lane / 4 + h * 8;
      position[h] = i < count ? first_position + i : -1;
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = 0.f;

    auto skip = [&](int block) {
      fill_ahead(block);
      ring.wait();
      // No product keeps the warpgroup together here: a warp that came late would wait for a phase that is already over.
      named_barrier(2 + wg, GROUP);
      ring.release(ring.stage);
      ring.advance();
    };
    auto weights = [&](int block) {
      hold((float (&)[SIDE / 2])s);
      if (CAPPED) cap_scores(s, scale, softcap);
      hide_scores(s, position, window, block * SIDE);
      return softmax.step(s, alpha, factor);
    };
    int block = first_block;
#pragma unroll 1
    for (; block < my_first; ++block) skip(block);
    if (my_first < my_end) {
      ring.wait();
      wgmma_fence();
      start_scores<D>(s, q, wgmma_step(k0, ring.stage * TILE));
      fill_ahead(block);
      wgmma_wait<0>();
      weights(block);
      pack_weights(p, s);
      ring.advance();
#pragma unroll 1
      for (++block; block < my_end; ++block) {
        ring.wait();
        wgmma_fence();
        start_scores<D>(s, q, wgmma_step(k0, ring.stage * TILE));
        start_weighted<D>(o, p, wgmma_step(v0, ring.before * TILE));
        fill_ahead(block);
        wgmma_wait<1>();
        // One wait per branch: the compiler would move a single wait before the branch to before the softmax.
        if (warp_any(weights(block))) {
          wgmma_wait<0>();
          hold((float (&)[D / 2])o);
          scale_rows(o, alpha);
        } else {
          wgmma_wait<0>();
          hold((float (&)[D / 2])o);
        }
        ring.release(ring.before);
        pack_weights(p, s);
        ring.advance();
      }
      wgmma_fence();
      start_weighted<D>(o, p, wgmma_step(v0, ring.before * TILE));
      wgmma_wait<0>();
      hold((float (&)[D / 2])o);
      ring.release(ring.before);
    }
#pragma unroll 1
    for (; block < end_block; ++block) skip(block);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = warp % 4 * 16 + lane / 4 + h * 8;
      const float sum = row_sum(softmax.l[h]), inverse = sum > 0.f ? 1.f / sum : 0.f;
      if (i >= count) continue;
      const long long place = (long long)(keys.start + first_row + i) * heads + head;
      if (lse && lane % 4 == 0) lse[place] = softmax.lse(h, sum);
      unsigned* to_row = (unsigned*)(out + place * D) + lane % 4;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) to_row[j * 4] = pack_bf16(o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse);
    }
  }
}
#endif

// out and lse of the rows of one item, for one head.
KERNEL(attention_hopper_fwd, D=64, THREADS=256, BLOCKS=64:2, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int ld, int heads,
 int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  if (softcap > 0.f)
    hopper_forward<D, true>(out, lse, qkv, map, items, segments, ld, heads, kv_heads, scale, softcap, window);
  else
    hopper_forward<D, false>(out, lse, qkv, map, items, segments, ld, heads, kv_heads, scale, softcap, window);
#endif
}

// The same at head size 128, without softcap.
KERNEL(attention_hopper_fwd_wide, D=128, THREADS=512, BLOCKS=128:1, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int ld, int heads,
 int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, false>(out, lse, qkv, map, items, segments, ld, heads, kv_heads, scale, softcap, window);
#endif
}

// With softcap; its tanh spills a few registers.
KERNEL(attention_hopper_fwd_wide_capped, D=128, THREADS=512, BLOCKS=128:1, SHARED=hopper_fwd_shared(D))
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int ld, int heads,
 int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, true>(out, lse, qkv, map, items, segments, ld, heads, kv_heads, scale, softcap, window);
#endif
}
