// Causal attention over packed sequences, the simt family: a thread a row, any dtype, no shared memory.
//
// Math     s = scale q.k;  s = c tanh(s / c) with a softcap;  key t is seen by position p if p - w < t <= p
//          m' = max(m, s);  a = e^(m - m');  l = a l + sum e^(s - m');  o = a o + sum e^(s - m') v;  out = o / l
//          lse = m + log l.  Backward: P = e^(s - lse), delta = dO.out, dS = P (dO.v - delta) (1 - (s/c)^2) scale,
//          dq = sum dS k, dk = sum dS q, dv = sum P dO  (Dao et al., "FlashAttention", 2022; "FlashAttention-2", 2023)
// Shapes   qkv, dqkv [rows, ld] real: q [heads, D] | k [kv_heads, D] | v [kv_heads, D];  out, dout [rows, heads D] real;
//          lse, delta [rows, heads] float;  segments [n, 6] int (SEGMENT_INTS): start, length, start and length of the prefix, first and
//          past-the-last place in `children`;  cache [slots, 2 kv_heads D] real, 64 slots a page
// Plan     attention_fwd, attention_dq: a thread a (row, head); attention_dkv: a thread a (key row, kv head). The threads
//          of a block share a kv head and neighbouring rows, so they read the same keys. 64 keys (or queries) a step:
//          scores, then 64 exponentials at once, then the sums. This is what CPUs run; on a GPU it is for checks.
// Numerics All in float; a dot product is 16 chains of fmaf and a tree; out is rounded when stored. A row is one
//          chain over the blocks of 64 positions of its own sequence, from position 0: the same bits in training, in
//          prefill chunks and in decode. Keys that are not seen are not read.
// Cost     4 D flops a (query, key) pair forward, 14 D executed backward (10 D counted). Two threads of an AVX2 EPYC, f32, D 64:
//          25 GFLOP/s forward, 17 backward; `cargo test attention_speed -- --nocapture` prints this machine's.
#include "common/mask.cuh"
#include "prim/lanes.cuh"

// On a GPU unrolled loops would only cost minutes of nvcc: what matters there is attention_mma.cu.
#ifdef __CUDACC__
#define COLUMNS_UNROLL _Pragma("unroll 1")
#define STEP_UNROLL _Pragma("unroll 1")
#else
#define COLUMNS_UNROLL
#define STEP_UNROLL
#endif

constexpr int QB = PAGE;  // keys (or, for dk and dv, queries) a step

// a.b by 16 chains over the columns; the tree over them is folded16's and then sum8's.
template <int D, class A>
DEVICE F16 dot_lanes(const A* a, const real* b) {
  F16 sum = mul16(load16(a), load16(b));
COLUMNS_UNROLL
  for (int d = 16; d < D; d += 16) sum = fma16(load16(a + d), load16(b + d), sum);
  return sum;
}

#ifndef __CUDACC__
// SUMS sums at once, each sum8(folded16(.)): a step halves the lanes that are left of each.
#if defined(__AVX512F__)
constexpr int SUMS = 16;
DEVICE void store_sums(float* to, const F16* a) {
  __m512 h[8], g[4], q[2];
  for (int i = 0; i < 8; ++i)  // of a[i] and a[i + 8]: lane + lane 8 further on
    h[i] = _mm512_shuffle_f32x4((__m512)a[i], (__m512)a[i + 8], 0x44) + _mm512_shuffle_f32x4((__m512)a[i], (__m512)a[i + 8], 0xee);
  for (int i = 0; i < 4; ++i) g[i] = _mm512_shuffle_f32x4(h[i], h[i + 4], 0x88) + _mm512_shuffle_f32x4(h[i], h[i + 4], 0xdd);
  for (int i = 0; i < 2; ++i)
    q[i] = _mm512_shuffle_ps(g[2 * i], g[2 * i + 1], 0x44) + _mm512_shuffle_ps(g[2 * i], g[2 * i + 1], 0xee);
  const __m512 sums = _mm512_shuffle_ps(q[0], q[1], 0x88) + _mm512_shuffle_ps(q[0], q[1], 0xdd);  // 0-3, 8-11, 4-7, 12-15
  store16(to, (F16)_mm512_shuffle_f32x4(sums, sums, 0xd8));
}
#elif defined(__AVX2__)
constexpr int SUMS = 8;
DEVICE void store_sums(float* to, const F16* a) {
  F8 h[4], q[2];
  for (int i = 0; i < 4; ++i) {  // of a[i] and a[i + 4]: lane + lane 4 further on
    const F8 x = folded16(a[i]), y = folded16(a[i + 4]);
    h[i] = __builtin_ia32_vperm2f128_ps256(x, y, 0x20) + __builtin_ia32_vperm2f128_ps256(x, y, 0x31);
  }
  for (int i = 0; i < 2; ++i)
    q[i] = __builtin_ia32_shufps256(h[2 * i], h[2 * i + 1], 0x44) + __builtin_ia32_shufps256(h[2 * i], h[2 * i + 1], 0xee);
  store8(to, __builtin_ia32_shufps256(q[0], q[1], 0x88) + __builtin_ia32_shufps256(q[0], q[1], 0xdd));
}
#else
constexpr int SUMS = 8;
DEVICE void store_sums(float* to, const F16* a) {
  for (int i = 0; i < SUMS; ++i) to[i] = sum8(folded16(a[i]));
}
#endif
#endif

// s[j] = a . x[at[j]] for j in [from, to).
template <int D>
DEVICE void dots(float* s, const float* a, const real* x, const long long* at, int from, int to) {
#ifdef __CUDACC__
#pragma unroll 1
  for (int j = from; j < to; ++j) s[j] = sum8(folded16(dot_lanes<D>(a, x + at[j])));
#else
  F16 lanes[SUMS];
  int j = from;
  for (; j + SUMS <= to; j += SUMS) {
    for (int i = 0; i < SUMS; ++i) lanes[i] = dot_lanes<D>(a, x + at[j + i]);
    store_sums(s + j, lanes);
  }
  if (j == to) return;
  float rest[SUMS];
  for (int i = 0; i < SUMS; ++i) lanes[i] = dot_lanes<D>(a, x + at[min_int(j + i, to - 1)]);
  store_sums(rest, lanes);
  for (int i = 0; j + i < to; ++i) s[j + i] = rest[i];
#endif
}

// o += sum of w[j] x[at[j]] over j in [from, to), in that order, in column chunks that stay in registers.
template <int D>
DEVICE void add_rows(float* o, const float* w, const real* x, const long long* at, int from, int to) {
  constexpr int C = D % 64 == 0 ? 64 : D;
STEP_UNROLL
  for (int c = 0; c < D; c += C) {
    F16 acc[C / 16];
COLUMNS_UNROLL
    for (int i = 0; i < C / 16; ++i) acc[i] = load16(o + c + i * 16);
STEP_UNROLL
    for (int j = from; j < to; ++j) {
      const real* row = x + at[j] + c;
      const F16 f = splat16(w[j]);
COLUMNS_UNROLL
      for (int i = 0; i < C / 16; ++i) acc[i] = fma16(f, load16(row + i * 16), acc[i]);
    }
COLUMNS_UNROLL
    for (int i = 0; i < C / 16; ++i) store16(o + c + i * 16, acc[i]);
  }
}

template <int D>
DEVICE void load_floats(float* to, const real* from) {
COLUMNS_UNROLL
  for (int i = 0; i < D; ++i) to[i] = to_float(from[i]);
}

template <int D>
DEVICE void store_reals(real* to, const float* from, float factor, int accumulate) {
  if (accumulate)
COLUMNS_UNROLL
    for (int i = 0; i < D; ++i) to[i] = to_real(fmaf(from[i], factor, to_float(to[i])));
  else
COLUMNS_UNROLL
    for (int i = 0; i < D; ++i) to[i] = to_real(from[i] * factor);
}

// Exponentials are taken some at a time, up to the last that is wanted: none for most of a row's last block.
constexpr int SOME = 16;
DEVICE int past_last(int to) { return (to + SOME - 1) / SOME * SOME; }

DEVICE float max_of(const float* s) {
  F8 m = load8(s);
STEP_UNROLL
  for (int j = 8; j < QB; j += 8) m = max8(m, load8(s + j));
  return largest8(m);
}

DEVICE float sum_of(const float* s) {
  F8 sum = load8(s);
STEP_UNROLL
  for (int j = 8; j < QB; j += 8) sum = add8(sum, load8(s + j));
  return sum8(sum);
}

// One row of one head: `keys` gives the place of each position's k (and v) row.
template <int D, class Keys>
DEVICE void attend(real* out, float* lse, const real* q_row, const real* k, const real* v, const Keys& keys, int position,
                   float scale, float softcap, int window) {
  float q[D], o[D], s[QB];
  long long at[QB];
  load_floats<D>(q, q_row);
COLUMNS_UNROLL
  for (int i = 0; i < D; ++i) o[i] = 0.f;
  float m = NEG_INF, l = 0.f;
  const int first = first_seen(position, window);
  for (int block = first / QB * QB; block <= position; block += QB) {
    const int from = max_int(first - block, 0), to = min_int(position + 1 - block, QB);
STEP_UNROLL
    for (int j = 0; j < QB; ++j) s[j] = NEG_INF;
STEP_UNROLL
    for (int j = from; j < to; ++j) at[j] = keys.at(block + j);
    dots<D>(s, q, k, at, from, to);
STEP_UNROLL
    for (int j = 0; j < QB; ++j) s[j] *= scale;
    if (softcap > 0.f)
STEP_UNROLL
      for (int j = 0; j < QB; ++j) s[j] = s[j] == NEG_INF ? NEG_INF : softcap * tanh_f(s[j] / softcap);
    const float m_new = max2(m, max_of(s));
    const float base = m_new == NEG_INF ? 0.f : m_new;
    const float alpha = exp_f(m - base);
    const int end = past_last(to);
STEP_UNROLL
    for (int i = 0; i < end; i += SOME)
STEP_UNROLL
      for (int j = i; j < i + SOME; ++j) s[j] = exp_f(s[j] - base);
STEP_UNROLL
    for (int j = end; j < QB; ++j) s[j] = 0.f;
    l = fmaf(l, alpha, sum_of(s));
    m = m_new;
COLUMNS_UNROLL
    for (int i = 0; i < D; ++i) o[i] *= alpha;
    add_rows<D>(o, s, v, at, from, to);
  }
  store_reals<D>(out, o, 1.f / l, 0);
  if (lse) *lse = m + log_f(l);
}

// out and lse of each row and head of a packed batch; `items` is the segment of each row.
KERNEL_FLAT(attention_fwd, D=16,32,64,80,96,128,256)(real* out, MAYBE(float) lse, const real* qkv,
                                                     const int* items, const int* segments, int rows, int ld, int heads,
                                                     int kv_heads, float scale, float softcap, int window) {
  const long long index = FLAT_INDEX;
  if (index >= (long long)rows * heads) return;
  const int group = heads / kv_heads;
  const int row = (int)(index / group % rows);
  const int kv_head = (int)(index / group / rows), head = kv_head * group + (int)(index % group);
  const SegmentKeys keys(segments, items[row], ld);
  const real* k = qkv + (heads + kv_head) * D;
  attend<D>(out + ((long long)row * heads + head) * D, lse ? lse + (long long)row * heads + head : lse,
            qkv + (long long)row * ld + head * D, k, k + kv_heads * D, keys, keys.position(row), scale, softcap, window);
}

// The same for rows whose keys and values (their own included) lie in the cache. A row of sequence -1 is padding.
KERNEL_FLAT(attention_paged_fwd, D=16,32,64,80,96,128,256)(real* out, const real* qkv, const real* cache,
                                                           const int* page_table, const int* row_sequence,
                                                           const int* row_position, int rows, int ld, int heads,
                                                           int kv_heads, int max_pages, float scale, float softcap,
                                                           int window) {
  const long long index = FLAT_INDEX;
  if (index >= (long long)rows * heads) return;
  const int group = heads / kv_heads;
  const int row = (int)(index / group % rows);
  const int kv_head = (int)(index / group / rows), head = kv_head * group + (int)(index % group);
  real* o = out + ((long long)row * heads + head) * D;
  const int sequence = row_sequence[row];
  if (sequence < 0) {
COLUMNS_UNROLL
    for (int i = 0; i < D; ++i) o[i] = to_real(0.f);
    return;
  }
  const PagedKeys keys = {page_table + (long long)sequence * max_pages, 2 * kv_heads * D};
  const real* k = cache + kv_head * D;
  attend<D>(o, (float*)0, qkv + (long long)row * ld + head * D, k, k + kv_heads * D, keys, row_position[row], scale, softcap,
            window);
}

// delta = dout . out of each row and head, for both families.
KERNEL_FLAT(attention_delta, D=16,32,64,80,96,128,256, HOT)(float* delta, const real* dout, const real* out, int count) {
  const long long index = FLAT_INDEX;
  if (index >= count) return;
  delta[index] = sum8(folded16(dot_lanes<D>(out + index * D, dout + index * D)));
}

// From 64 scores q.k and dO.v: s becomes P, ds the gradient of q.k, in the places [from, to).
DEVICE void score_gradients(float* s, float* ds, const float* lse, const float* delta, int from, int to, float scale,
                            float softcap) {
  float slope[QB];
STEP_UNROLL
  for (int j = 0; j < QB; ++j) {
    s[j] *= scale;
    slope[j] = scale;
  }
  if (softcap > 0.f)
STEP_UNROLL
    for (int j = 0; j < QB; ++j) {
      const float t = tanh_f(s[j] / softcap);
      s[j] = softcap * t;
      slope[j] = scale * fmaf(-t, t, 1.f);
    }
STEP_UNROLL
  for (int i = from / SOME * SOME; i < past_last(to); i += SOME)
STEP_UNROLL
    for (int j = i; j < i + SOME; ++j) {
      s[j] = exp_f(s[j] - lse[j]);
      ds[j] = s[j] * (ds[j] - delta[j]) * slope[j];
    }
}

// The q columns of dqkv.
KERNEL_FLAT(attention_dq, D=16,32,64,80,96,128,256)(INOUT(real) dqkv, const real* dout, const real* qkv, const float* lse,
                                                    const float* delta, const int* items, const int* segments,
                                                    const int* children, int rows, int ld, int heads, int kv_heads,
                                                    float scale, float softcap, int window, int accumulate) {
  const long long index = FLAT_INDEX;
  if (index >= (long long)rows * heads) return;
  const int group = heads / kv_heads;
  const int row = (int)(index / group % rows);
  const int kv_head = (int)(index / group / rows), head = kv_head * group + (int)(index % group);
  const SegmentKeys keys(segments, items[row], ld);
  const int position = keys.position(row), first = first_seen(position, window);
  const real* k = qkv + (heads + kv_head) * D;
  const real* v = k + kv_heads * D;
  float q[D], up[D], dq[D], s[QB], ds[QB], lse_of[QB], delta_of[QB];
  long long at[QB];
  load_floats<D>(q, qkv + (long long)row * ld + head * D);
  load_floats<D>(up, dout + ((long long)row * heads + head) * D);
COLUMNS_UNROLL
  for (int i = 0; i < D; ++i) dq[i] = 0.f;
STEP_UNROLL
  for (int j = 0; j < QB; ++j) {
    lse_of[j] = lse[(long long)row * heads + head];
    delta_of[j] = delta[(long long)row * heads + head];
    s[j] = ds[j] = 0.f;
  }
  for (int block = first / QB * QB; block <= position; block += QB) {
    const int from = max_int(first - block, 0), to = min_int(position + 1 - block, QB);
STEP_UNROLL
    for (int j = from; j < to; ++j) at[j] = keys.at(block + j);
    dots<D>(s, q, k, at, from, to);
    dots<D>(ds, up, v, at, from, to);
    score_gradients(s, ds, lse_of, delta_of, from, to, scale, softcap);
    add_rows<D>(dq, ds, k, at, from, to);
  }
  store_reals<D>(dqkv + (long long)row * ld + head * D, dq, 1.f, accumulate);
}

// The k and v columns of dqkv. The queries that see a key: those of its own segment, then those of the segments that
// have it as their prefix, head after head.
KERNEL_FLAT(attention_dkv, D=16,32,64,80,96,128,256)(INOUT(real) dqkv, const real* dout, const real* qkv,
                                                     const float* lse, const float* delta, const int* items,
                                                     const int* segments, const int* children, int rows, int ld, int heads,
                                                     int kv_heads, float scale, float softcap, int window, int accumulate) {
  const long long index = FLAT_INDEX;
  if (index >= (long long)rows * kv_heads) return;
  const int row = (int)(index % rows), kv_head = (int)(index / rows), group = heads / kv_heads;
  const int segment = items[row];
  const int position = SegmentKeys(segments, segment, ld).position(row);
  const int column = (heads + kv_head) * D;
  float k[D], v[D], dk[D], dv[D], s[QB], ds[QB], lse_of[QB], delta_of[QB];
  long long at[QB], up_at[QB];
  load_floats<D>(k, qkv + (long long)row * ld + column);
  load_floats<D>(v, qkv + (long long)row * ld + column + kv_heads * D);
COLUMNS_UNROLL
  for (int i = 0; i < D; ++i) dk[i] = dv[i] = 0.f;
STEP_UNROLL
  for (int j = 0; j < QB; ++j) s[j] = ds[j] = lse_of[j] = delta_of[j] = 0.f;
  const int child_end = segments[segment * SEGMENT_INTS + 5];
  for (int c = segments[segment * SEGMENT_INTS + 4] - 1; c < child_end; ++c) {
    const bool own = c < segments[segment * SEGMENT_INTS + 4];
    const QueryRange range(segments, own ? segment : children[c], position, window, own ? row : -1);
    for (int g = 0; g < group; ++g) {
      const int head = kv_head * group + g;
      for (int block = range.from; block < range.to; block += QB) {
        const int count = min_int(range.to - block, QB);
STEP_UNROLL
        for (int j = 0; j < count; ++j) {
          const long long r = block + j;
          at[j] = r * ld;
          up_at[j] = r * heads * D;
          lse_of[j] = lse[r * heads + head];
          delta_of[j] = delta[r * heads + head];
        }
        dots<D>(s, k, qkv + head * D, at, 0, count);
        dots<D>(ds, v, dout + head * D, up_at, 0, count);
        score_gradients(s, ds, lse_of, delta_of, 0, count, scale, softcap);
        add_rows<D>(dv, s, dout + head * D, up_at, 0, count);
        add_rows<D>(dk, ds, qkv + head * D, at, 0, count);
      }
    }
  }
  store_reals<D>(dqkv + (long long)row * ld + column, dk, 1.f, accumulate);
  store_reals<D>(dqkv + (long long)row * ld + column + kv_heads * D, dv, 1.f, accumulate);
}
