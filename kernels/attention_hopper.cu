// Causal attention over packed sequences, forward, with TMA and wgmma: bf16, sm_90a, head sizes 64 and 128. Math: attention.cu.
//
// Math     as attention_mma.cu, whose softmax it shares
// Shapes   as attention_mma_fwd, but items are of hopper_fwd_rows(D) rows;  map: boxes of 64 x 64 of qkv
// Plan     a block a (256 or 192 query rows, head): four or three warpgroups of 64 rows each consume blocks of 64 positions of
//          K and V from a ring in shared memory, and skip those that none of their rows sees. Another fills the ring, by TMA,
//          or by cp.async where a block is not one box: where a prefix ends inside it, and at the end of the segment (so that
//          no neighbour's NaN comes in). S of a block is started before the product of P and V of the block before, which runs under the
//          softmax. Blocks are persistent, so that the loads of a tile run under the end of the one before; long tiles come
//          first, in rounds of alternating direction.
// Numerics bit for bit those of attention_mma_fwd: wgmma accumulates like a chain of mma.sync, the accumulators lie in the
//          same lanes, and the blocks and the softmax are the same
// Cost     4 D flops a pair. At head size 64 the exponents alone take as many cycles as the products (one MUFU a score), at 128
//          half as many. H100, 2026-11-27, causal: 371 TFLOP/s (8 x 2048, 14/2 heads) and 641 (2 x 8192, 16/8 heads), 38% and
//          65% of the tensor cores' 989; cuDNN in the same hour 362 and 580
#include "common/online_softmax.cuh"
#include "prim/wgmma_loop.cuh"

// Query rows of a block, 64 a warpgroup: as many as the registers feed.
EXPORT_FN(hopper_fwd_rows, d, d <= 64 ? 256 : 192);
// Stages of the ring.
EXPORT_FN(hopper_fwd_stages, d, d <= 64 ? 8 : 4);
// Bytes of shared memory: two tiles of Q, the ring of K and V, two mbarriers for each of them and for each stage.
EXPORT_FN(hopper_fwd_shared, d, (2 * hopper_fwd_rows(d) + 2 * 64 * hopper_fwd_stages(d)) * d * 2 + 16 * (hopper_fwd_stages(d) + 2));

#if HOPPER && defined(REAL_BF16)
constexpr int GROUP = 128;                    // threads of a warpgroup
constexpr int SIDE = 64;                      // rows of a tile: of a warpgroup's queries, of a block's keys
template <int D>
constexpr int CONSUMERS = hopper_fwd_rows(D) / SIDE;
constexpr int BOX = SIDE * 64;                // values of a box; a tile of D columns is D / 64 boxes

typedef float Scores[SIDE / 8][4];
typedef unsigned Weights[SIDE / 16][4];

// Starts the copy of a block of K and V by a warpgroup; row i of K lies at base + offset(i), that of V so many values further;
// it is zeros where the offset is negative. Not unrolled: its addresses would cost registers.
template <int D, class Offset>
DEVICE void fetch_tile(bf16* k, bf16* v, const bf16* base, int further, const Offset& offset) {
  constexpr int CHUNKS = D / 8;
  const int t = (int)threadIdx.x % GROUP, c = t % CHUNKS;
#pragma unroll 1
  for (int r = t / CHUNKS; r < SIDE; r += GROUP / CHUNKS) {
    const long long at = offset(r);
    const int to = c / 8 * BOX + swizzle128(r, c % 8) / 2, valid = at < 0 ? 0 : 16;
    const bf16* from = base + (at < 0 ? 0 : at + c * 8);
    copy_async16(k + to, from, valid);
    copy_async16(v + to, from + further, valid);
  }
}

// Starts s = Q K^T.
template <int D>
DEVICE void start_scores(Scores& s, wgmma_operand q, wgmma_operand k) {
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
    const int at = kk / 4 * BOX + kk % 4 * 16;
    wgmma_ss<SIDE, false, false>((float (&)[SIDE / 2])s, wgmma_step(q, at), wgmma_step(k, at), kk > 0);
  }
  wgmma_commit();
}

// Starts o += P V.
template <int D>
DEVICE void start_weighted(float (&o)[D / 8][4], const Weights& p, wgmma_operand v) {
#pragma unroll
  for (int kk = 0; kk < SIDE / 16; ++kk)
    wgmma_rs<D, true>((float (&)[D / 2])o, p[kk], wgmma_step(v, kk * 16 * 64), true);
  wgmma_commit();
}

DEVICE void pack_weights(Weights& p, const Scores& s) {
#pragma unroll
  for (int j = 0; j < SIDE / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) p[j / 2][j % 2 * 2 + h] = pack_bf16(s[j][2 * h], s[j][2 * h + 1]);
}

// What lies in shared memory, and where one user of the ring of K and V stands in it.
template <int D>
struct Shared {
  static constexpr int STAGES = hopper_fwd_stages(D), TILE = SIDE * D;
  bf16 *q, *k, *v;
  mbarrier *full, *empty, *q_full, *q_empty;
  int stage = 0, phase = 0;
  DEVICE_MEMBER Shared(unsigned char* base) {
    q = (bf16*)base;
    k = q + 2 * CONSUMERS<D> * TILE;
    v = k + STAGES * TILE;
    full = (mbarrier*)(v + STAGES * TILE);
    empty = full + STAGES;
    q_full = empty + STAGES;
    q_empty = q_full + 2;
  }
  DEVICE_MEMBER void init() {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, CONSUMERS<D>);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(q_full + i, 1);
      mbarrier_init(q_empty + i, CONSUMERS<D>);
    }
    mbarrier_fence();
  }
  DEVICE_MEMBER void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// The n-th item of this block: rounds over all blocks, every other one backwards, so that none always gets the longest.
DEVICE int nth_item(int n) {
  const int last = (int)gridDim.x - 1, b = blockIdx.x;
  return n * (last + 1) + (n % 2 ? last - b : b);
}

// A tile of query rows of one head, and the blocks of positions that they see.
template <int D>
struct Item {
  int head, row, length;  // the first row, and the segment's length
  SegmentKeys keys;
  int first_block, end_block, to;  // `to`: the first position that is no row's
  DEVICE_MEMBER Item(const int* items, const int* segments, int at, int ld, int heads, int window)
      : Item(items + at / heads * 2, segments, ld, at % heads, window) {}
  DEVICE_MEMBER Item(const int* item, const int* segments, int ld, int head, int window)
      : head(head), row(item[1]), length(segments[item[0] * SEGMENT_INTS + 1]), keys(segments, item[0], ld) {
    first_block = first_seen(keys.prefix_length + row, window) / SIDE;
    to = keys.prefix_length + min_int(row + hopper_fwd_rows(D), length);
    end_block = (to + SIDE - 1) / SIDE;
  }
};

// The last warpgroup's part: all tiles of Q, all blocks of K and V.
template <int D>
DEVICE void produce(Shared<D>& shared, const real* qkv, const tensor_map& map, const int* items, const int* segments, int count,
                    int ld, int heads, int kv_heads, int window) {
  constexpr int TILE = SIDE * D;
  const bool first_thread = threadIdx.x % GROUP == 0;
  shared.phase = 1;  // for an empty ring there is no one to wait for
#pragma unroll 1
  for (int n = 0; nth_item(n) < count; ++n) {
    const Item<D> item(items, segments, nth_item(n), ld, heads, window);
    const SegmentKeys& keys = item.keys;
    const int k_column = (heads + item.head / (heads / kv_heads)) * D, v_column = k_column + kv_heads * D;
    if (first_thread) {
      mbarrier* full = shared.q_full + n % 2;
      mbarrier_wait(shared.q_empty + n % 2, n / 2 % 2 ^ 1);
      mbarrier_expect(full, CONSUMERS<D> * TILE * (int)sizeof(bf16));
#pragma unroll 1
      for (int w = 0; w < CONSUMERS<D>; ++w)  // rows beyond the segment's are someone's or zeros, and nobody's results
        for (int c = 0; c < D / 64; ++c)
          tma_load(shared.q + (n % 2 * CONSUMERS<D> + w) * TILE + c * BOX, &map, full, item.head * D + c * 64,
                   keys.start + item.row + w * SIDE);
    }
#pragma unroll 1
    for (int block = item.first_block; block < item.end_block; ++block) {
      const int p = block * SIDE, at = shared.stage;
      bf16 *k = shared.k + at * TILE, *v = shared.v + at * TILE;
      if (p + SIDE <= keys.prefix_length + item.length && (p >= keys.prefix_length || p + SIDE <= keys.prefix_length)) {
        if (first_thread) {
          mbarrier_wait(shared.empty + at, shared.phase);
          mbarrier_expect(shared.full + at, 2 * TILE * (int)sizeof(bf16));
          for (int c = 0; c < D / 64; ++c) {
            tma_load(k + c * BOX, &map, shared.full + at, k_column + c * 64, keys.row(p));
            tma_load(v + c * BOX, &map, shared.full + at, v_column + c * 64, keys.row(p));
          }
        }
      } else {
        // One waits for all: the others may be rounds ahead, where the parity would tell them nothing.
        if (first_thread) mbarrier_wait(shared.empty + at, shared.phase);
        named_barrier(1, GROUP);
        fetch_tile<D>(k, v, qkv + k_column, kv_heads * D, [&](int i) { return p + i < item.to ? keys.at(p + i) : -1ll; });
        copy_commit();
        copy_wait<0>();
        fence_async_proxy();
        named_barrier(1, GROUP);
        if (first_thread) mbarrier_arrive(shared.full + at);
      }
      shared.advance();
    }
  }
}

// A warpgroup's 64 rows of each tile.
template <int D, bool CAPPED>
DEVICE void consume(Shared<D>& shared, real* out, float* lse, const int* items, const int* segments, int count, int ld, int heads,
                    float scale, float softcap, int window) {
  constexpr int TILE = SIDE * D;
  const int wg = shfl((int)threadIdx.x / GROUP, 0);
  const float factor = score_factor(scale, softcap);
  const wgmma_operand q0 = wgmma_desc<true>(shared.q + wg * TILE), k0 = wgmma_desc<true>(shared.k), v0 = wgmma_desc<false>(shared.v);
  auto arrive = [&](mbarrier* b) {
    if (threadIdx.x % GROUP == 0) mbarrier_arrive(b);
  };
  auto wait = [&] { mbarrier_wait(shared.full + shared.stage, shared.phase); };
  // Between a wait and the release of what was waited for, the warpgroup meets: here, or in a wgmma. A warp that came late
  // would find the mbarrier a round further, with the parity of a phase that is not over.
  auto meet = [&] { named_barrier(2 + wg, GROUP); };
  auto skip = [&] {
    wait();
    meet();
    arrive(shared.empty + shared.stage);
    shared.advance();
  };
#pragma unroll 1
  for (int n = 0; nth_item(n) < count; ++n) {
    const Item<D> item(items, segments, nth_item(n), ld, heads, window);
    const int first_row = item.row + wg * SIDE, mine = min_int(item.length - first_row, SIDE);  // maybe none
    const int first_position = item.keys.prefix_length + first_row;
    const int my_first = mine > 0 ? first_seen(first_position, window) / SIDE : item.end_block;
    const int my_end = mine > 0 ? (first_position + mine + SIDE - 1) / SIDE : item.end_block;
    const int i0 = (int)threadIdx.x % GROUP / 32 * 16 + (int)threadIdx.x % 32 / 4;  // this thread's rows: i0 and i0 + 8
    OnlineSoftmax softmax;
    float o[D / 8][4], alpha[2];
    Scores s;
    Weights p;
    int position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) position[h] = i0 + h * 8 < mine ? first_position + i0 + h * 8 : -1;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = 0.f;
    mbarrier_wait(shared.q_full + n % 2, n / 2 % 2);
    const wgmma_operand q = wgmma_step(q0, n % 2 * CONSUMERS<D> * TILE);
    int block = item.first_block, before = 0;
    auto weights = [&] {
      hold((float (&)[SIDE / 2])s);
      if (CAPPED) cap_scores(s, scale, softcap);
      hide_scores(s, position, window, block * SIDE);
      return softmax.step(s, alpha, factor);
    };
#pragma unroll 1
    for (; block < my_first; ++block) skip();
    if (my_first < my_end) {
      wait();
      wgmma_fence();
      start_scores<D>(s, q, wgmma_step(k0, shared.stage * TILE));
      wgmma_wait<0>();
      weights();
      pack_weights(p, s);
      before = shared.stage;
      shared.advance();
#pragma unroll 1
      for (++block; block < my_end; ++block) {
        wait();
        wgmma_fence();
        start_scores<D>(s, q, wgmma_step(k0, shared.stage * TILE));
        start_weighted<D>(o, p, wgmma_step(v0, before * TILE));
        wgmma_wait<1>();
        // Two waits in two branches: one before them the compiler would put before the softmax.
        if (warp_any(weights())) {
          wgmma_wait<0>();
          hold((float (&)[D / 2])o);
          scale_rows(o, alpha);
        } else {
          wgmma_wait<0>();
          hold((float (&)[D / 2])o);
        }
        arrive(shared.empty + before);
        pack_weights(p, s);
        before = shared.stage;
        shared.advance();
      }
      arrive(shared.q_empty + n % 2);
      wgmma_fence();
      start_weighted<D>(o, p, wgmma_step(v0, before * TILE));
      wgmma_wait<0>();
      hold((float (&)[D / 2])o);
      arrive(shared.empty + before);
    } else {
      meet();
      arrive(shared.q_empty + n % 2);
    }
    // Read again: kept over the loop it would cost registers.
    const Item<D> same(items, segments, nth_item(hold(n)), ld, heads, window);
#pragma unroll 1
    for (; block < same.end_block; ++block) skip();
    const int start = same.keys.start - same.keys.prefix_length;  // where position 0 would be
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = row_sum(softmax.l[h]), inverse = sum > 0.f ? 1.f / sum : 0.f;
      if (position[h] < 0) continue;
      const long long place = (long long)(start + position[h]) * heads + same.head;
      if (lse && threadIdx.x % 4 == 0) lse[place] = softmax.lse(h, sum);
      unsigned* to_row = (unsigned*)(out + place * D) + threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) to_row[j * 4] = pack_bf16(o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse);
    }
  }
}

template <int D, bool CAPPED>
DEVICE void hopper_forward(real* out, float* lse, const real* qkv, const tensor_map& map, const int* items, const int* segments,
                           int count, int ld, int heads, int kv_heads, float scale, float softcap, int window) {
  Shared<D> shared(shared_base());
  if (threadIdx.x == 0) shared.init();
  block_sync();
  if (shfl((int)threadIdx.x / GROUP, 0) == CONSUMERS<D>) {
    registers_dec<32>();
    produce(shared, qkv, map, items, segments, count, ld, heads, kv_heads, window);
  } else {
    registers_inc<D <= 64 ? 112 : 160>();
    consume<D, CAPPED>(shared, out, lse, items, segments, count, ld, heads, scale, softcap, window);
  }
}
#endif

// out and lse of `count` pairs of an item and a head, without softcap. The number of threads goes with the head size.
KERNEL(attention_hopper_fwd4, D=64, THREADS=640, BLOCKS=1, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int count, int ld,
 int heads, int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, false>(out, lse, qkv, map, items, segments, count, ld, heads, kv_heads, scale, softcap, window);
#endif
}

// The same at head size 128.
KERNEL(attention_hopper_fwd3, D=128, THREADS=512, BLOCKS=1, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int count, int ld,
 int heads, int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, false>(out, lse, qkv, map, items, segments, count, ld, heads, kv_heads, scale, softcap, window);
#endif
}

// The same with softcap at head size 64: apart, so that the kernels without it stay short.
KERNEL(attention_hopper_fwd4_capped, D=64, THREADS=640, BLOCKS=1, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int count, int ld,
 int heads, int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, true>(out, lse, qkv, map, items, segments, count, ld, heads, kv_heads, scale, softcap, window);
#endif
}

// The same with softcap at head size 128.
KERNEL(attention_hopper_fwd3_capped, D=128, THREADS=512, BLOCKS=1, SHARED=hopper_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const tensor_map& map, const int* items, const int* segments, int count, int ld,
 int heads, int kv_heads, float scale, float softcap, int window) {
#if HOPPER && defined(REAL_BF16)
  hopper_forward<D, true>(out, lse, qkv, map, items, segments, count, ld, heads, kv_heads, scale, softcap, window);
#endif
}
