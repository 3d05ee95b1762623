// Causal attention over packed sequences on tensor cores: bf16, sm_80 and newer. Math and shapes: attention.cu.
//
// Math     FlashAttention-2 (Dao, 2023), with the exponent in base 2: P = 2^(s log2(e) - m)
// Shapes   As attention.cu, with the same arguments, so that one struct serves both variants (`rows` and, in dq, `children` are
//          unused here);  items [tiles, 2] int: segment, first row in it
// Plan     4 warps own 64 rows, 16 each; a step is 64 positions of the other side (32 where registers are short), copied to
//          shared memory by cp.async. attention_mma_fwd: one block per (64 query rows, head). attention_mma_paged: one block per
//          (run of rows of one sequence, kv head), with the heads of a group side by side in the 64 rows, so a decode step reads
//          each key once. attention_mma_dq: as the forward. attention_mma_dkv: one block per (64 key rows, kv head), over the
//          queries that see them; head size 256 takes two blocks, one for dk and one for dv. No atomics.
// Numerics s, the softmax and all sums in float; P and dS are rounded to bf16 as operands; l sums P before rounding. A row is one
//          chain over the blocks of 64 positions from position 0 of its own sequence, whatever else is in its tile.
// Cost     4 D flops a pair forward, 14 D executed backward (dq 6, dkv 8; 10 at head size 256). H100, 2026-11-27: forward 218
//          TFLOP/s at head size 64 (8 x 2048, 14/2 heads), 230 at 128 (2 x 8192, 16/8); backward 88 at 64, before ex2.
#include "prim/async.cuh"
#include "common/attention_mma.cuh"

// Positions per step of dq and of dkv: fewer where registers are short.
EXPORT_FN(mma_dq_step, d, d <= 128 ? 64 : 32);
EXPORT_FN(mma_dkv_step, d, d > 80 || d == 32 ? 32 : 64);
// Blocks per tile of keys: above head size 128 one for dk and one for dv.
EXPORT_FN(mma_dkv_parts, d, d <= 128 ? 1 : 2);
// Bytes of shared memory. Forward: three tiles of MMA_ROWS. Backward: two of MMA_ROWS and two of a step.
EXPORT_FN(mma_fwd_shared, d, 3 * MMA_ROWS * mma_stride(d) * 2);
EXPORT_FN(mma_dq_shared, d, 2 * (MMA_ROWS + mma_dq_step(d)) * mma_stride(d) * 2);
EXPORT_FN(mma_dkv_shared, d, 2 * (MMA_ROWS + mma_dkv_step(d)) * mma_stride(d) * 2);

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

// dk (WANT_K) and dv (WANT_V) of 64 key rows of a segment, from all queries that see them.
template <int D, bool WANT_K, bool WANT_V>
DEVICE void key_gradients(real* dqkv, const real* dout, const real* qkv, const float* lse, const float* delta,
                          const int* segments, const int* children, int segment, int first, int kv_head, int ld, int heads,
                          int kv_heads, float scale, float softcap, int window, int accumulate) {
  constexpr int N = mma_dkv_step(D), S = STRIDE<D>;
  bf16* sk = (bf16*)shared_base();
  bf16* sv = sk + ROWS * S;
  bf16* sq = sv + ROWS * S;  // the padding of a row holds its lse and delta
  bf16* sdo = sq + N * S;
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
  copy_commit();
  for (int c = mine[4] - 1; c < mine[5]; ++c) {
    const bool own = c < mine[4];
    const int* user = segments + (own ? segment : children[c]) * SEGMENT_INTS;
    // Rows [0, to) of the segment `user` reach at least one key of the tile.
    const long long reach = (long long)end - 1 + window - user[3];
    const int to = reach < user[1] ? (int)reach : user[1];
    for (int g = 0; g < group; ++g) {
      const int head = kv_head * group + g;
      for (int block = own ? first : 0; block < to; block += N) {
        block_sync();  // all warps have read the tiles of the previous step
        fetch_rows<D, N>(sq, qkv + head * D, [&](int i) {
          return block + i < to ? (long long)(user[0] + block + i) * ld : -1ll;
        });
        fetch_rows<D, N>(sdo, dout + head * D, [&](int i) {
          return block + i < to ? (long long)(user[0] + block + i) * heads * D : -1ll;
        });
        copy_commit();
        if (threadIdx.x < N) {
          const bool there = block + (int)threadIdx.x < to;
          const long long place = there ? (long long)(user[0] + block + threadIdx.x) * heads + head : 0;
          float* pad = (float*)(sq + threadIdx.x * S + D);
          pad[0] = there ? lse[place] : 0.f;
          pad[1] = there ? delta[place] : 0.f;
        }
        copy_wait<0>();
        block_sync();
        float s[N / 8][4], dp[N / 8][4];
        scores<D, N>(s, sk + warp * 16 * S, sq);
        if (WANT_K)
          scores<D, N>(dp, sv + warp * 16 * S, sdo);
        else
          clear(dp);
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = j * 8 + lane % 4 * 2 + e, position = user[3] + block + i;
            const float* pad = (const float*)(sq + i * S + D);
            const float lse_of = pad[0], delta_of = pad[1];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int t = key + h * 8;
              const bool seen = block + i < to && t < end && t <= position && t >= first_seen(position, window);
              score_gradient(s[j][2 * h + e], dp[j][2 * h + e], seen, lse_of, delta_of, scale, softcap);
            }
          }
        if constexpr (WANT_V) weighted_rows<D, N>(dv, s, sdo);
        if constexpr (WANT_K) weighted_rows<D, N>(dk, dp, sq);
      }
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
KERNEL(attention_mma_dq, D=16,32,64,80,96,128,256, THREADS=128, SHARED=mma_dq_shared(D), HOT)
(INOUT(real) dqkv, const real* dout, const real* qkv, const float* lse, const float* delta, const int* items, const int* segments,
 const int* children, int rows, int ld, int heads, int kv_heads, float scale, float softcap, int window, int accumulate) {
#ifdef REAL_BF16
  constexpr int N = mma_dq_step(D), S = STRIDE<D>;
  bf16* sq = (bf16*)shared_base();
  bf16* sdo = sq + ROWS * S;
  bf16* sk = sdo + ROWS * S;
  bf16* sv = sk + N * S;
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
  for (int block = first_seen(first_position, window) / N * N; block < to; block += N) {
    block_sync();  // all warps have read the tiles of the previous step
    auto key_row = [&](int i) { return block + i < to ? keys.at(block + i) : -1ll; };
    fetch_rows<D, N>(sk, k, key_row);
    fetch_rows<D, N>(sv, v, key_row);
    copy_commit();
    copy_wait<0>();
    block_sync();
    float s[N / 8][4], dp[N / 8][4];
    scores<D, N>(s, sq + warp * 16 * S, sk);
    scores<D, N>(dp, sdo + warp * 16 * S, sv);
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
  }
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
KERNEL(attention_mma_dkv, D=16,32,64,80,96,128,256, THREADS=128, BLOCKS=32:3, SHARED=mma_dkv_shared(D), HOT)
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
