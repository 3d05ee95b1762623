// Causal attention over packed sequences on tensor cores: bf16, sm_80 and newer. Math and shapes: attention.cu.
//
// Math     FlashAttention-2 (Dao, 2023), with the exponent in base 2: P = 2^(s log2(e) - m)
// Shapes   As attention.cu, with the same arguments, so that one struct serves both variants (`rows` and, in dq, `children` are
//          unused here);  items [tiles, 2] int: segment, first row in it
// Plan     4 warps own 64 rows, 16 each, against steps of positions of the other side (64 forward, mostly 32 backward), copied to
//          shared memory by cp.async. attention_mma_fwd: one block per (64 query rows, head). attention_mma_paged: one block per
//          (run of rows of one sequence, kv head), with the heads of a group side by side in the 64 rows, so a step reads each key
//          once. attention_mma_dq: as the forward. attention_mma_dkv: one block per (64 key rows, kv head), over the queries that
//          see them; head size 256 takes two blocks, one for dk and one for dv. The backward copies a step ahead where two stages
//          fit. No atomics.
// Numerics s, the softmax and all sums in float; P and dS are rounded to bf16 as operands; l sums P before rounding. A row is one
//          chain over the blocks of 64 positions from position 0 of its own sequence, whatever else is in its tile.
// Cost     4 D flops a pair forward, 14 D executed backward (dq 6, dkv 8; 10 at head size 256). H100, 2026-11-27: forward 218
//          TFLOP/s at head size 64 (8 x 2048, 14/2 heads), 230 at 128 (2 x 8192, 16/8); backward 88 at 64, before
//          ex2 and before it copied ahead; *predicted* 130, not measured.
#include "prim/async.cuh"
#include "common/attention_mma.cuh"

// Positions per step of the backward, and the steps that shared memory holds: the copies of the next one run while this one is
// multiplied. Each step and each stage is as large as keeps two blocks on an SM with 100 KB; 80 columns in steps of 32 would not
// be whole turns of 128 threads.
EXPORT_FN(mma_bwd_step, d, d == 16 || d == 80 ? 64 : 32);
EXPORT_FN(mma_bwd_stages, d, d == 80 || d > 128 ? 1 : 2);
// Blocks per tile of keys: above head size 128 one for dk and one for dv.
EXPORT_FN(mma_dkv_parts, d, d <= 128 ? 1 : 2);
// Bytes of shared memory. Forward: three tiles of MMA_ROWS. Backward: two of MMA_ROWS, and in each stage two of a step.
EXPORT_FN(mma_fwd_shared, d, 3 * MMA_ROWS * mma_stride(d) * 2);
EXPORT_FN(mma_bwd_shared, d, 2 * (MMA_ROWS + mma_bwd_stages(d) * mma_bwd_step(d)) * mma_stride(d) * 2);

#ifdef REAL_BF16
// Starts the copy of N rows of D values. Row i is read from base + offset(i), and is zero where offset(i) is negative.
template <int D, int N, class Offset>
DEVICE void fetch_rows(bf16* tile, const bf16* base, const Offset& offset) {
  static_assert(N * D / 8 % 128 == 0, "128 threads take whole turns");
  constexpr int TURNS = N * D / 8 / 128, UNROLL = TURNS <= 5 ? TURNS : 4;  // unrolling all would cost registers for addresses
#pragma unroll UNROLL
  for (int i = 0; i < TURNS; ++i) {
    const int c = (int)threadIdx.x + i * 128, r = c / (D / 8), col = c % (D / 8) * 8;
    const long long at = offset(r);
    copy_async16(tile + r * STRIDE<D> + col, base + (at < 0 ? 0 : at + col), at < 0 ? 0 : 16);
  }
}

// This warp's 16 rows of a tile of 64 that stays for a whole block: in registers where there are few columns, which spares the reads
// of shared memory that bound these products.
template <int D>
struct OwnRows {
  static constexpr bool HELD = D <= 64;
  const bf16* tile;
  unsigned held[HELD ? D / 16 : 1][4];
  // The tile has arrived.
  DEVICE_MEMBER void begin() {
    if constexpr (HELD) {
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) fragment(held[kk], kk);
    }
  }
  DEVICE_MEMBER void fragment(unsigned (&f)[4], int kk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix4<false>(f, tile + (lane / 8 % 2 * 8 + lane % 8) * STRIDE<D> + kk * 16 + lane / 16 * 8);
  }
  // acc = these rows times the N rows of B.
  template <int N>
  DEVICE_MEMBER void scores(float (&acc)[N / 8][4], const bf16* b) const {
    const int lane = threadIdx.x % 32, half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
    clear(acc);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      unsigned fa[4];
      if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fa[i] = held[kk][i];
      } else {
        fragment(fa, kk);
      }
#pragma unroll
      for (int j = 0; j < N / 8; j += 2) {
        unsigned fb[4];
        ldmatrix4<false>(fb, b + (j * 8 + upper + r) * STRIDE<D> + kk * 16 + half);
        mma_bf16(acc[j], fa, {fb[0], fb[1]});
        mma_bf16(acc[j + 1], fa, {fb[2], fb[3]});
      }
    }
  }
};

// acc += W B: W is this warp's 16 x N, in the register layout of `scores`; B has N rows of D columns.
template <int D, int N>
DEVICE void weighted_rows(float (&acc)[D / 8][4], const float (&w)[N / 8][4], const bf16* b) {
  const int lane = threadIdx.x % 32, half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
#pragma unroll
  for (int kk = 0; kk < N / 16; ++kk) {
    const unsigned fa[4] = {pack_bf16(w[2 * kk][0], w[2 * kk][1]), pack_bf16(w[2 * kk][2], w[2 * kk][3]),
                            pack_bf16(w[2 * kk + 1][0], w[2 * kk + 1][1]), pack_bf16(w[2 * kk + 1][2], w[2 * kk + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      unsigned fb[4];
      ldmatrix4<true>(fb, b + (kk * 16 + half + r) * STRIDE<D> + j * 8 + upper);
      mma_bf16(acc[j], fa, {fb[0], fb[1]});
      mma_bf16(acc[j + 1], fa, {fb[2], fb[3]});
    }
  }
}

// Stores two neighbouring values of a gradient.
DEVICE void store_pair(bf16* to, float a, float b, int accumulate) {
  if (accumulate) {
    const unsigned old = *(const unsigned*)to;
    a += bits_to_float((int)(old << 16));
    b += bits_to_float((int)(old & 0xffff0000u));
  }
  *(unsigned*)to = pack_bf16(a, b);
}

// The 64 rows of a forward block. Index i maps to the global row row(i), -1 if there is none.
struct SegmentRows {
  int first_row, count, h, first_position;
  DEVICE_MEMBER int row(int i) const { return i < count ? first_row + i : -1; }
  DEVICE_MEMBER int head(int) const { return h; }
  DEVICE_MEMBER int position(int i) const { return i < count ? first_position + i : -1; }
};
struct GroupRows {
  int first_row, count, group, first_head;
  const int* row_position;
  DEVICE_MEMBER int row(int i) const { return i / group < count ? first_row + i / group : -1; }
  DEVICE_MEMBER int head(int i) const { return first_head + i % group; }
  DEVICE_MEMBER int position(int i) const { return row(i) < 0 ? -1 : row_position[row(i)]; }
};

// The forward of 64 rows against the positions [from, to).
template <int D, class Rows, class Keys>
DEVICE void forward(real* out, float* lse, const real* q, const real* k, const real* v, const Rows& rows, const Keys& keys,
                    int from, int to, int ld, int heads, float scale, float softcap, int window) {
  bf16* sq = (bf16*)shared_base();
  bf16* sk = sq + ROWS * STRIDE<D>;
  bf16* sv = sk + ROWS * STRIDE<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int position[2], place[2];  // place: index of (row, head) in out, -1 if there is no row
  const float factor = score_factor(scale, softcap);
  OnlineSoftmax softmax;
  float o[D / 8][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = warp * 16 + lane / 4 + h * 8, row = rows.row(i);
    place[h] = row < 0 ? -1 : row * heads + rows.head(i);
    position[h] = rows.position(i);
  }
  clear(o);
  fetch_rows<D, ROWS>(sq, q, [&](int i) { return rows.row(i) < 0 ? -1ll : (long long)rows.row(i) * ld + rows.head(i) * D; });
  int block = from / ROWS * ROWS;
  if (block < to) fetch_rows<D, ROWS>(sk, k, [&](int i) { return block + i < to ? keys.at(block + i) : -1ll; });
  copy_commit();
  for (; block < to; block += ROWS) {
    copy_wait<0>();
    block_sync();
    fetch_rows<D, ROWS>(sv, v, [&](int i) { return block + i < to ? keys.at(block + i) : -1ll; });
    copy_commit();
    float s[ROWS / 8][4];
    scores<D, ROWS>(s, sq + warp * 16 * STRIDE<D>, sk);
    copy_wait<0>();
    block_sync();
    const int next = block + ROWS;
    if (next < to) fetch_rows<D, ROWS>(sk, k, [&](int i) { return next + i < to ? keys.at(next + i) : -1ll; });
    copy_commit();
    cap_scores(s, scale, softcap);
    hide_scores(s, position, window, block);
    float alpha[2];
    if (softmax.step(s, alpha, factor)) scale_rows(o, alpha);
    weighted_rows<D, ROWS>(o, s, sv);
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = row_sum(softmax.l[h]), inverse = sum > 0.f ? 1.f / sum : 0.f;
    if (place[h] < 0) continue;
    if (lse && lane % 4 == 0) lse[place[h]] = softmax.lse(h, sum);
    real* to_row = out + (long long)place[h] * D + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      store_pair(to_row + j * 8, o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse, 0);
  }
}

// For one element: replaces s (q.k) by P and dp (dO.v) by the gradient of q.k.
DEVICE void score_gradient(float& s, float& dp, bool seen, float lse, float delta, float scale, float softcap) {
  float x = s, slope = scale;
  if (softcap > 0.f) {
    const float t = tanh_f(s * scale / softcap);
    x = softcap * t;
    slope = scale * fmaf(-t, t, 1.f);
  }
  s = seen ? exp2_fast(fmaf(x, score_factor(scale, softcap), -lse * LOG2_E)) : 0.f;
  dp = s * (dp - delta) * slope;
}

// Steps over the queries that see a tile of keys: the tile's own segment (from the tile's first row on) and the segments that have
// it as their prefix, in each the heads of the group, and in each the rows by N.
template <int N>
struct QuerySteps {
  const int *segments, *children, *mine;
  int segment, first, end, window, group;
  const int* user;
  int c, g, block, begin, to;
  // The first step of segment number `next` or of one after it that has any. False: there is none.
  DEVICE_MEMBER bool find(int next) {
    for (c = next; c < mine[5]; ++c) {
      const bool own = c < mine[4];
      user = segments + (own ? segment : children[c]) * SEGMENT_INTS;
      // Rows [0, to) of the segment `user` reach at least one key of the tile.
      const long long reach = (long long)end - 1 + window - user[3];
      to = reach < user[1] ? (int)reach : user[1];
      begin = block = own ? first : 0;
      g = 0;
      if (begin < to) return true;
    }
    return false;
  }
  DEVICE_MEMBER bool advance() {
    block += N;
    if (block < to) return true;
    block = begin;
    return ++g < group || find(c + 1);
  }
};

// dk (WANT_K) and dv (WANT_V) of 64 key rows of a segment, from all queries that see them.
template <int D, bool WANT_K, bool WANT_V>
DEVICE void key_gradients(real* dqkv, const real* dout, const real* qkv, const float* lse, const float* delta,
                          const int* segments, const int* children, int segment, int first, int kv_head, int ld, int heads,
                          int kv_heads, float scale, float softcap, int window, int accumulate) {
  constexpr int N = mma_bwd_step(D), S = STRIDE<D>, STAGES = mma_bwd_stages(D);
  bf16* sk = (bf16*)shared_base();
  bf16* sv = sk + ROWS * S;
  bf16* stages = sv + ROWS * S;  // of each: q, whose rows' padding holds their lse and delta, and dO
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = heads / kv_heads;
  const int* mine = segments + segment * SEGMENT_INTS;
  const int count = min_int(mine[1] - first, ROWS), first_position = mine[3] + first;
  const int key = first_position + warp * 16 + lane / 4;  // and key + 8
  const int end = first_position + count;
  const long long column = (long long)(heads + kv_head) * D;
  float dk[WANT_K ? D / 8 : 1][4], dv[WANT_V ? D / 8 : 1][4];
  clear(dk);
  clear(dv);
  auto key_row = [&](int i) { return i < count ? (long long)(mine[0] + first + i) * ld : -1ll; };
  fetch_rows<D, ROWS>(sk, qkv + column, key_row);
  if (WANT_K) fetch_rows<D, ROWS>(sv, qkv + column + kv_heads * D, key_row);
  QuerySteps<N> next = {segments, children, mine, segment, first, end, window, group, nullptr, 0, 0, 0, 0, 0};
  float figures[2] = {0.f, 0.f};  // lse and delta of a row of the next step
  auto start = [&](bf16* sq) {
    const int head = kv_head * group + next.g, row0 = next.user[0] + next.block, left = next.to - next.block;
    fetch_rows<D, N>(sq, qkv + head * D, [&](int i) { return i < left ? (long long)(row0 + i) * ld : -1ll; });
    fetch_rows<D, N>(sq + N * S, dout + head * D, [&](int i) { return i < left ? (long long)(row0 + i) * heads * D : -1ll; });
    if (threadIdx.x < N) {
      const bool there = (int)threadIdx.x < left;
      const long long place = there ? (long long)(row0 + threadIdx.x) * heads + head : 0;
      figures[0] = there ? lse[place] : 0.f;
      figures[1] = there ? delta[place] : 0.f;
    }
  };
  // Apart from `start`, so that the loads have the time of a step to arrive.
  auto put_figures = [&](bf16* sq) {
    if (threadIdx.x < N) {
      float* pad = (float*)(sq + threadIdx.x * S + D);
      pad[0] = figures[0];
      pad[1] = figures[1];
    }
  };
  bool more = next.find(mine[4] - 1);
  if (more) {
    start(stages);
    put_figures(stages);
  }
  copy_commit();
  OwnRows<D> k_rows = {sk + warp * 16 * S}, v_rows = {sv + warp * 16 * S};
  bool begun = false;
  for (int stage = 0; more; stage = (stage + 1) % STAGES) {
    const QuerySteps<N> at = next;
    bf16 *sq = stages + stage * 2 * N * S, *sdo = sq + N * S, *other = stages + (stage + 1) % STAGES * 2 * N * S;
    more = next.advance();
    if (STAGES > 1 && more) start(other);
    copy_commit();
    copy_wait<STAGES - 1>();
    block_sync();
    if (!begun) {
      k_rows.begin();
      if (WANT_K) v_rows.begin();
      begun = true;
    }
    float s[N / 8][4], dp[N / 8][4];
    k_rows.template scores<N>(s, sq);
    if (WANT_K)
      v_rows.template scores<N>(dp, sdo);
    else
      clear(dp);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = j * 8 + lane % 4 * 2 + e, position = at.user[3] + at.block + i;
        const float* pad = (const float*)(sq + i * S + D);
        const float lse_of = pad[0], delta_of = pad[1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int t = key + h * 8;
          const bool seen = at.block + i < at.to && t < end && t <= position && t >= first_seen(position, window);
          score_gradient(s[j][2 * h + e], dp[j][2 * h + e], seen, lse_of, delta_of, scale, softcap);
        }
      }
    if constexpr (WANT_V) weighted_rows<D, N>(dv, s, sdo);
    if constexpr (WANT_K) weighted_rows<D, N>(dk, dp, sq);
    if (STAGES > 1 && more) put_figures(other);
    block_sync();  // all warps have read this stage
    if (STAGES == 1 && more) {
      start(other);
      put_figures(other);
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = warp * 16 + lane / 4 + h * 8;
    if (i >= count) continue;
    real* to = dqkv + (long long)(mine[0] + first + i) * ld + column + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      if constexpr (WANT_K) store_pair(to + j * 8, dk[j][2 * h], dk[j][2 * h + 1], accumulate);
      if constexpr (WANT_V) store_pair(to + kv_heads * D + j * 8, dv[j][2 * h], dv[j][2 * h + 1], accumulate);
    }
  }
}
#endif

// out and lse of 64 rows of one head.
KERNEL(attention_mma_fwd, D=16,32,64,80,96,128,256, THREADS=128, BLOCKS=32:5, BLOCKS=80:3, SHARED=mma_fwd_shared(D), HOT)
(real* out, MAYBE(float) lse, const real* qkv, const int* items, const int* segments, int rows, int ld, int heads, int kv_heads,
 float scale, float softcap, int window) {
#ifdef REAL_BF16
  const int head = blockIdx.x % heads, tile = blockIdx.x / heads;
  const int segment = items[2 * tile], first = items[2 * tile + 1];
  const SegmentKeys keys(segments, segment, ld);
  const int count = min_int(segments[segment * SEGMENT_INTS + 1] - first, ROWS), position = keys.prefix_length + first;
  const SegmentRows placed = {keys.start + first, count, head, position};
  const real* k = qkv + (heads + head / (heads / kv_heads)) * D;
  forward<D>(out, lse, qkv, k, k + kv_heads * D, placed, keys, first_seen(position, window), position + count, ld, heads,
             scale, softcap, window);
#endif
}

// The same over the paged cache. There is a block for each (row, kv head), but only the block of the first row of a run of rows
// of one sequence works, for the whole run. A run ends where its heads fill the 64 rows.
KERNEL(attention_mma_paged, D=16,32,64,80,96,128,256, THREADS=128, BLOCKS=16:6, BLOCKS=80:3, SHARED=mma_fwd_shared(D), HOT)
(real* out, const real* qkv, const real* cache, const int* page_table, const int* row_sequence, const int* row_position, int rows,
 int ld, int heads, int kv_heads, int max_pages, float scale, float softcap, int window) {
#ifdef REAL_BF16
  const int kv_head = blockIdx.x % kv_heads, row = blockIdx.x / kv_heads, group = heads / kv_heads, run = ROWS / group;
  const int sequence = row_sequence[row];
  if (row % run != 0 && row_sequence[row - 1] == sequence) return;
  int count = 1, to = row_position[row] + 1, from = first_seen(to - 1, window);
  for (; row + count < rows && (row + count) % run != 0 && row_sequence[row + count] == sequence; ++count) {
    const int position = row_position[row + count];
    to = max_int(to, position + 1);
    from = min_int(from, first_seen(position, window));
  }
  const GroupRows all = {row, count, group, kv_head * group, row_position};
  const PagedKeys keys = {page_table + (long long)max_int(sequence, 0) * max_pages, 2 * kv_heads * D};
  const real* k = cache + kv_head * D;
  forward<D>(out, (float*)0, qkv, k, k + kv_heads * D, all, keys, from, sequence < 0 ? 0 : to, ld, heads, scale, softcap,
             window);
#endif
}

// The q columns of dqkv for 64 rows of one head.
KERNEL(attention_mma_dq, D=16,32,64,80,96,128,256, THREADS=128, SHARED=mma_bwd_shared(D), HOT)
(INOUT(real) dqkv, const real* dout, const real* qkv, const float* lse, const float* delta, const int* items, const int* segments,
 const int* children, int rows, int ld, int heads, int kv_heads, float scale, float softcap, int window, int accumulate) {
#ifdef REAL_BF16
  constexpr int N = mma_bwd_step(D), S = STRIDE<D>, STAGES = mma_bwd_stages(D);
  bf16* sq = (bf16*)shared_base();
  bf16* sdo = sq + ROWS * S;
  bf16* stages = sdo + ROWS * S;  // of each: k and v
  const int head = blockIdx.x % heads, tile = blockIdx.x / heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int segment = items[2 * tile], first = items[2 * tile + 1];
  const SegmentKeys keys(segments, segment, ld);
  const int count = min_int(segments[segment * SEGMENT_INTS + 1] - first, ROWS), first_position = keys.prefix_length + first;
  const int to = first_position + count;
  const real* k = qkv + (heads + head / (heads / kv_heads)) * D;
  const real* v = k + kv_heads * D;
  float lse_of[2], delta_of[2], dq[D / 8][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = warp * 16 + lane / 4 + h * 8;
    const long long place = (long long)(keys.start + first + min_int(i, count - 1)) * heads + head;
    lse_of[h] = lse[place];
    delta_of[h] = delta[place];
  }
  clear(dq);
  fetch_rows<D, ROWS>(sq, qkv + head * D, [&](int i) { return i < count ? (long long)(keys.start + first + i) * ld : -1ll; });
  fetch_rows<D, ROWS>(sdo, dout + head * D, [&](int i) {
    return i < count ? (long long)(keys.start + first + i) * heads * D : -1ll;
  });
  auto start = [&](int block, bf16* sk) {
    auto key_row = [&](int i) { return block + i < to ? keys.at(block + i) : -1ll; };
    fetch_rows<D, N>(sk, k, key_row);
    fetch_rows<D, N>(sk + N * S, v, key_row);
  };
  int block = first_seen(first_position, window) / N * N;
  start(block, stages);
  copy_commit();
  OwnRows<D> q_rows = {sq + warp * 16 * S}, do_rows = {sdo + warp * 16 * S};
  bool begun = false;
  for (int stage = 0; block < to; stage = (stage + 1) % STAGES, block += N) {
    bf16 *sk = stages + stage * 2 * N * S, *sv = sk + N * S, *other = stages + (stage + 1) % STAGES * 2 * N * S;
    if (STAGES > 1 && block + N < to) start(block + N, other);
    copy_commit();
    copy_wait<STAGES - 1>();
    block_sync();
    if (!begun) {
      q_rows.begin();
      do_rows.begin();
      begun = true;
    }
    float s[N / 8][4], dp[N / 8][4];
    q_rows.template scores<N>(s, sk);
    do_rows.template scores<N>(dp, sv);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = warp * 16 + lane / 4 + h * 8, position = first_position + i, low = first_seen(position, window);
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int t = block + j * 8 + lane % 4 * 2 + e;
          score_gradient(s[j][2 * h + e], dp[j][2 * h + e], i < count && t <= position && t >= low, lse_of[h], delta_of[h],
                         scale, softcap);
        }
    }
    weighted_rows<D, N>(dq, dp, sk);
    block_sync();  // all warps have read this stage
    if (STAGES == 1 && block + N < to) start(block + N, other);
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = warp * 16 + lane / 4 + h * 8;
    if (i >= count) continue;
    real* row = dqkv + (long long)(keys.start + first + i) * ld + head * D + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) store_pair(row + j * 8, dq[j][2 * h], dq[j][2 * h + 1], accumulate);
  }
#endif
}

// The k and v columns of dqkv for 64 rows of one kv head.
KERNEL(attention_mma_dkv, D=16,32,64,80,96,128,256, THREADS=128, BLOCKS=32:3, SHARED=mma_bwd_shared(D), HOT)
(INOUT(real) dqkv, const real* dout, const real* qkv, const float* lse, const float* delta, const int* items, const int* segments,
 const int* children, int rows, int ld, int heads, int kv_heads, float scale, float softcap, int window, int accumulate) {
#ifdef REAL_BF16
  constexpr int parts = mma_dkv_parts(D);
  const int part = blockIdx.x % parts, at = blockIdx.x / parts;
  const int kv_head = at % kv_heads, tile = at / kv_heads;
  const int segment = items[2 * tile], first = items[2 * tile + 1];
  if constexpr (parts == 1)
    key_gradients<D, true, true>(dqkv, dout, qkv, lse, delta, segments, children, segment, first, kv_head, ld, heads, kv_heads,
                                 scale, softcap, window, accumulate);
  else if (part == 0)
    key_gradients<D, true, false>(dqkv, dout, qkv, lse, delta, segments, children, segment, first, kv_head, ld, heads,
                                  kv_heads, scale, softcap, window, accumulate);
  else
    key_gradients<D, false, true>(dqkv, dout, qkv, lse, delta, segments, children, segment, first, kv_head, ld, heads,
                                  kv_heads, scale, softcap, window, accumulate);
#endif
}
