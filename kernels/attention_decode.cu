// Attention of a decoding step: one row of each sequence against the paged cache, with the rotation and the append in front.
//
// Math     As attention.cu; before it, as rope_append (rope.cu): q and k are normed and rotated, k and v go to the cache
// Shapes   qkv [rows, (heads + 2 kv) D] real with row stride ld; out [rows, heads D]; cache [pages * PAGE, 2 kv D] real, k|v; slots
//          [rows] int gives the row of the cache that k and v go to (-1: none), or is null: then q is rotated already, and k and v
//          are in the cache; cosine, sine [positions, D/2] float; wq, wk [D] real or null; others as attention_mma_paged
// Plan     A block per (row, kv head), with the heads of the group as the 16 rows of a tile. A turn is one page for each of its
//          warps: every warp computes the scores of its page, all follow the chain of bases over the turn's pages, every warp
//          weighs its page, and then sums D / warps columns of the values over all of them. So the long latencies (copies,
//          products, exponentials) run side by side, and only the chain of sums is left in sequence. K of the next turn is copied
//          during the softmax, V during the next scores. Before the block waits for its predecessor it asks L2 for its first pages.
//          One row takes two blocks and hardly any of the memory's time: then further blocks, from number `blocks` on, only ask L2
//          for the weights of the products that follow (next0, next1: so many lines of 128 bytes).
// Numerics A row is the chain of attention_mma_paged, with the same products and sums in the same order: the same bits, whatever the
//          number of warps.
// Cost     The keys and values once: 4 D bytes a position and kv head. H100, Qwen2.5-0.5B, 400 positions: one row 4 us (copies 1.5,
//          two turns of 0.7, start 1) where rope_append and attention_mma_paged took 4 and 11; 256 rows 20 us (17.5 at copy speed)
//          where they took 6 and 17.5. Next weights: 19 MB of a layer (o and gate|up) in 6.5 us, beside this kernel and the product
//          behind it, so gate|up comes from L2: 4 us for 7. *Predicted*, not measured.
#include "prim/async.cuh"
#include "common/attention_mma.cuh"
#include "common/rope.cuh"

// Heads of a group that fit a tile.
EXPORT(int, DECODE_HEADS, 16);
// Warps of a block; twice as many where there are few blocks.
EXPORT_FN(decode_warps, d, 256 / d);
// Bytes of shared memory: q and the new k and v, and for each warp its weights, tops and sums, and pages of K and V.
EXPORT_FN(decode_warp_shared, d, 16 * (PAGE + 8) * 2 + 16 * 4 + 64 * 4 + 2 * PAGE * mma_stride(d) * 2);
EXPORT_FN(decode_block_shared, d, (16 + 2) * mma_stride(d) * 2 + 32 * 4);

#ifdef REAL_BF16
constexpr int P_STRIDE = PAGE + 8;

// One over the root of the mean square of a head, in the order of rstd_of_head (rope.cu). All lanes of a warp call it.
template <int D>
DEVICE float rstd_of_head_by_lanes(const real* head, float eps) {
  FlatPack square = {};
  for (int i = (int)threadIdx.x % 32 * V; i < D; i += 32 * V) {
    const FlatPack v = load<V>(head + i, D - i);
#pragma unroll
    for (int j = 0; j < V; ++j) square.v[j] = fmaf(v.v[j], v.v[j], square.v[j]);
  }
  return rstd_by_lanes(square, D, eps);
}

// acc += P V for COLUMNS columns of V: P has 16 rows of PAGE weights.
template <int D, int COLUMNS>
DEVICE void add_values(float (&acc)[COLUMNS / 8][4], const bf16* p, const bf16* v) {
  const int lane = threadIdx.x % 32, half = lane / 8 % 2 * 8, upper = lane / 16 * 8, r = lane % 8;
#pragma unroll
  for (int k = 0; k < PAGE; k += 32) {
    unsigned a[2][4];
    ldmatrix4<false>(a[0], p + (half + r) * P_STRIDE + k + upper);
    ldmatrix4<false>(a[1], p + (half + r) * P_STRIDE + k + 16 + upper);
    if constexpr (COLUMNS == 8) {  // one load has the 32 positions of these columns
      unsigned b[4];
      ldmatrix4<true>(b, v + (k + upper * 2 + half + r) * STRIDE<D>);
      mma_bf16(acc[0], a[0], {b[0], b[1]});
      mma_bf16(acc[0], a[1], {b[2], b[3]});
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2) {
          unsigned b[4];
          ldmatrix4<true>(b, v + (k + i * 16 + half + r) * STRIDE<D> + j * 8 + upper);
          mma_bf16(acc[j], a[i], {b[0], b[1]});
          mma_bf16(acc[j + 1], a[i], {b[2], b[3]});
        }
    }
  }
}

struct DecodeArgs {
  real* out;
  const real* qkv;
  real* cache;
  const int *pages, *row_sequence, *row_position, *slots;
  const float *cosine, *sine;
  const real *wq, *wk;
  int ld, heads, kv_heads, max_pages, window, once;
  float scale, softcap, eps, plus;
};

template <int D, int W>
DEVICE void decode(const DecodeArgs& a) {
  constexpr int COLUMNS = D / W, S = STRIDE<D>;
  bf16* sq = (bf16*)shared_base();
  bf16* fresh = sq + 16 * S;  // the row's own k and v
  float* rstds = (float*)(fresh + 2 * S);
  float* tops = rstds + 32;     // [W][16]
  float* sums = tops + W * 16;  // [W][16][4]
  bf16* sp = (bf16*)(sums + W * 64);
  bf16* sk = sp + W * 16 * P_STRIDE;
  bf16* sv = sk + W * PAGE * S;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = a.heads / a.kv_heads;
  const int kv_head = blockIdx.x % a.kv_heads, row = blockIdx.x / a.kv_heads;
  // Copies write these arrays, no kernel does: they may be read before the wait.
  const int sequence = a.row_sequence[row], position = a.row_position[row];
  const int to = sequence < 0 ? 0 : position + 1, from = first_seen(position, a.window) / PAGE * PAGE;
  const PagedKeys keys = {a.pages + (long long)max_int(sequence, 0) * a.max_pages, 2 * a.kv_heads * D};
  const real* k_cache = a.cache + kv_head * D;
  const long long to_v = a.kv_heads * D;
  // The row's own k and v do not come from the cache where this block appends them.
  const int cached = a.slots && sequence >= 0 ? position : to;
  {
    const int block = from + warp * PAGE;
    if (block < to)
      for (int i = lane; i < min_int(cached - block, PAGE); i += 32) {
        const real* p = k_cache + keys.at(block + i);
        for (int c = 0; c < D; c += 64) prefetch_l2(p + c), prefetch_l2(p + to_v + c);
      }
  }
  wait_for_previous();

  bf16 *my_k = sk + warp * PAGE * S, *my_v = sv + warp * PAGE * S;
  // Starts the copy of this warp's page of K or of V.
  auto fetch_page = [&](bf16* tile, long long offset, int block) {
    const real* base = k_cache + offset + (block < to ? keys.at(block) : 0);
    for (int c = lane; c < PAGE * D / 8; c += 32) {
      const int i = c / (D / 8), col = c % (D / 8) * 8, at = block + i;
      if (at < to && at >= cached) continue;  // place_fresh writes it
      copy_async16(tile + i * S + col, base + (at < to ? i * keys.ld + col : 0), at < to ? 16 : 0);
    }
  };
  auto place_fresh = [&](bf16* tile, const bf16* values, int block) {
    if (cached < to && cached >= block && cached < block + PAGE)
      for (int c = lane; c < D / 8; c += 32) store(tile + (cached - block) * S + c * 8, load<V>(values + c * 8, V), V);
  };
  int block = from + warp * PAGE;
  if (block < to) fetch_page(my_k, 0, block);
  copy_commit();
  if (block < to) fetch_page(my_v, to_v, block);
  copy_commit();

  // q, and with slots k and v.
  const real* own = a.qkv + (long long)row * a.ld;
  const real *own_q = own + kv_head * group * D, *own_k = own + (a.heads + kv_head) * D;
  if (a.wq) {
    for (int h = warp; h <= group; h += W) {
      const float r = rstd_of_head_by_lanes<D>(h < group ? own_q + h * D : own_k, a.eps);
      if (lane == 0) rstds[h] = r;
    }
    block_sync();
  }
  constexpr int PACKS = D / 2 / V;
  const int slot = a.slots ? a.slots[row] : -1;
  real* stored = a.cache + (long long)max_int(slot, 0) * keys.ld + kv_head * D;
  for (int item = threadIdx.x; item < 17 * PACKS; item += 32 * W) {
    const int h = item / PACKS, i = item % PACKS * V;  // h 16: k and v
    if (h < 16 && h >= group) {
      store(sq + h * S + i, FlatPack{}, V);
      store(sq + h * S + D / 2 + i, FlatPack{}, V);
      continue;
    }
    if (h == 16 && !a.slots) continue;
    const real* x = h < 16 ? own_q + h * D : own_k;
    FlatPack low = load<V>(x + i, V), high = load<V>(x + D / 2 + i, V);
    const HeadPairs at = {i, D / 2 + i, V, i};
    if (a.wq) norm_pairs<true>(low, high, h < 16 ? a.wq : a.wk, at, rstds[h < 16 ? h : group], a.plus, a.once);
    if (a.cosine) {
      const long long p = (long long)position * (D / 2) + i;
      rotate(low, high, load<V>(a.cosine + p, V), load<V>(a.sine + p, V), 1.f);
    }
    bf16* to_row = h < 16 ? sq + h * S : fresh;
    store(to_row + i, low, V);
    store(to_row + D / 2 + i, high, V);
    if (h == 16) {
      const FlatPack v0 = load<V>(own_k + to_v + i, V), v1 = load<V>(own_k + to_v + D / 2 + i, V);
      store(fresh + S + i, v0, V);
      store(fresh + S + D / 2 + i, v1, V);
      if (slot >= 0) {
        store(stored + i, low, V);
        store(stored + D / 2 + i, high, V);
        store(stored + to_v + i, v0, V);
        store(stored + to_v + D / 2 + i, v1, V);
      }
    }
  }
  block_sync();
  place_fresh(my_k, fresh, block);
  place_fresh(my_v, fresh + S, block);

  const float factor = score_factor(a.scale, a.softcap);
  const int positions[2] = {lane / 4 < group ? position : -1, lane / 4 + 8 < group ? position : -1};
  float base[2] = {NO_BASE, NO_BASE}, l[2] = {0.f, 0.f}, o[COLUMNS / 8][4];
  clear(o);
  for (int turn = from; turn < to; turn += W * PAGE, block += W * PAGE) {
    const int next = block + W * PAGE, here = min_int((to - turn + PAGE - 1) / PAGE, W);  // pages of this turn
    float s[PAGE / 8][4];
    copy_wait<1>();  // K
    warp_sync();
    if (warp < here) {
      scores<D, PAGE>(s, sq, my_k);
      cap_scores(s, a.scale, a.softcap);
      hide_scores(s, positions, a.window, block);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float top = block_top(s, h, factor);
        if (lane % 4 == 0) tops[warp * 16 + lane / 4 + h * 8] = top;
      }
    }
    warp_sync();
    if (next < to) {
      fetch_page(my_k, 0, next);
      place_fresh(my_k, fresh, next);
    }
    copy_commit();
    block_sync();
    float alpha[W][2], mine[2] = {};
#pragma unroll
    for (int p = 0; p < W; ++p)
      if (p < here) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          alpha[p][h] = follow_top(base[h], tops[p * 16 + lane / 4 + h * 8]);
          mine[h] = p == warp ? base[h] : mine[h];
        }
      }
    if (warp < here) {
      bf16* weights = sp + warp * 16 * P_STRIDE;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane / 4 + h * 8;
        sums[warp * 64 + r * 4 + lane % 4] = weigh(s, h, factor, mine[h]);
#pragma unroll
        for (int j = 0; j < PAGE / 8; ++j)
          *(unsigned*)(weights + r * P_STRIDE + j * 8 + lane % 4 * 2) = pack_bf16(s[j][2 * h], s[j][2 * h + 1]);
      }
    }
    copy_wait<1>();  // V; the next K may be on its way
    block_sync();
#pragma unroll
    for (int p = 0; p < W; ++p)
      if (p < here) {
        const float of_page[2] = {sums[p * 64 + lane], sums[p * 64 + 32 + lane]};
#pragma unroll
        for (int h = 0; h < 2; ++h) l[h] = fmaf(l[h], alpha[p][h], of_page[h]);
        scale_rows(o, alpha[p]);
        add_values<D, COLUMNS>(o, sp + p * 16 * P_STRIDE, sv + p * PAGE * S + warp * COLUMNS);
      }
    block_sync();
    if (next < to) {
      fetch_page(my_v, to_v, next);
      place_fresh(my_v, fresh + S, next);
    }
    copy_commit();
  }
  copy_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = row_sum(l[h]), inverse = sum > 0.f ? 1.f / sum : 0.f;
    const int head = lane / 4 + h * 8;
    if (head >= group) continue;
    real* to_row = a.out + ((long long)row * a.heads + kv_head * group + head) * D + warp * COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
      *(unsigned*)(to_row + j * 8) = pack_bf16(o[j][2 * h] * inverse, o[j][2 * h + 1] * inverse);
  }
}

// Asks L2 for this block's lines of the next weights.
DEVICE void prefetch_lines(const real* p, int lines, int block, int blocks) {
  for (int i = block * blockDim.x + threadIdx.x; i < lines; i += blocks * blockDim.x) prefetch_l2(p + (long long)i * 64);
}
#endif

// The block has decode_warps(D) warps or twice as many.
KERNEL(attention_decode, D=64,128, HOT, WAITS)(real* out, const real* qkv, INOUT(real) cache, const int* page_table,
       const int* row_sequence, const int* row_position, MAYBE(const int) slots, MAYBE(const float) cosine, MAYBE(const float) sine,
       MAYBE(const real) wq, MAYBE(const real) wk, MAYBE(const real) next0, MAYBE(const real) next1, int lines0, int lines1,
       int blocks, int ld, int heads, int kv_heads, int max_pages, float scale, float softcap,
       int window, float eps, float plus, int once) {
#ifdef REAL_BF16
  if ((int)blockIdx.x >= blocks) {
    prefetch_lines(next0, lines0, blockIdx.x - blocks, gridDim.x - blocks);
    prefetch_lines(next1, lines1, blockIdx.x - blocks, gridDim.x - blocks);
    wait_for_previous();
    return;
  }
  const DecodeArgs args = {out,    qkv,  cache,    page_table, row_sequence, row_position, slots, cosine, sine, wq, wk, ld,
                           heads,  kv_heads, max_pages, window,   once,         scale,        softcap, eps,   plus};
  if (blockDim.x == 32 * decode_warps(D)) decode<D, decode_warps(D)>(args);
  else decode<D, 2 * decode_warps(D)>(args);
#else
  wait_for_previous();
#endif
}
