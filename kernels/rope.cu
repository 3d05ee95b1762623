// Rotary position embedding of q and k, with the optional norm before it: over each head (Qwen3's and Gemma 3's qk-norm), or over
// all heads of q and all heads of k (OLMo 2's).
//
// Math     n = (wq + plus) * h, h = x * rstd, rstd = 1/sqrt(mean(x^2) + eps) over a head, or (`whole`) over all heads (without a
//          norm n = x); plus = 0, or 1 for Gemma
//          y1 = n1 cos - n2 sin, y2 = n2 cos + n1 sin for the halves n1, n2 of a head   (Su et al., RoFormer, 2021; halves as in
//          GPT-NeoX and transformers' rotate_half); v is copied
//          Only the first `turned` values of a head are rotated, the first half of them against the second: all (turned = dim), a
//          part (Phi-4-mini), none (turned = 0, SmolLM3's layers without rope). q may be multiplied by a factor that depends on
//          its position (Ministral 3).
// Shapes   x, y [rows, (heads + 2 kv) * dim] real, q|k|v side by side;  cos, sin [positions, turned/2] float;  q_scale
//          [positions] float;  position [rows] int;  wq, wk [dim] real, with `whole` [heads dim], [kv dim];  rstd [rows, heads +
//          kv] float
//          rope_append, for generation: q is rotated in place; k (rotated) and v go to a row of the cache, 2 kv dim wide, k|v;
//          slots [rows] int gives that row, -1: none
// Plan     rope_apply: one thread per V pairs (or V values of v) of ROPE_HEADS neighbouring heads, which share their angles (of
//          one head, where half a head is not a whole number of packs). The values that are not rotated are split in two halves
//          as well, so a thread always has pairs. Heads that are rotated whole and not scaled have variants of their own (without
//          MORE). Norm statistics, the backward of the norm and rope_append: one warp per head (`whole`: all heads of q, or of k;
//          rope_append then takes rstd from head_rstd, since q is rotated in place). dw: a warp sums 64 heads, sum_partials adds
//          the partials.
// Numerics float; h (unless `once`) and n are rounded to real as in transformers; y is rounded when stored (q once, after
//          rotation and scaling; transformers rounds between the two). The backward rotates by -angle. rope_append calls the same
//          functions as rope_apply and head_rstd, so its values have the same bits.
// Cost     2 (heads + 2 kv) dim sizeof(real) bytes a row. H100, 2026-11-27, as shares of copy speed: rope_apply 83% at 16,384
//          rows of 14 + 4 heads of 64 (31.6 us; with one head per thread 69%), 93% at 12 + 4 heads of 128, 69% at 16 + 16 normed
//          heads of 128 and 4,096 rows (59%).
//          rope_append at 256 rows of Qwen2.5-0.5B moves 1.2 MB in one wave of blocks: 6.4 us, where 2.5 was predicted, and where
//          rope_apply and a copy into the cache took 4.6 + 3.5 us. With one warp per head only latency is left.
#include "common/rope.cuh"

// rstd of one head. All lanes of the warp must call it.
DEVICE float rstd_of_head(const real* p, int dim, float eps) {
  WarpPack square = {};
  for (int i = WCOL; i < dim; i += WARP_STEP) {
    WarpPack v = load_row(p, i, dim);
#pragma unroll
    for (int j = 0; j < WV; ++j) square.v[j] = fmaf(v.v[j], v.v[j], square.v[j]);
  }
  return rstd_of(pack_sum(square), dim, eps);
}

// Heads of a row that a thread of rope_apply rotates by the same angles, if half a head is a whole number of packs (else 1).
EXPORT(int, ROPE_HEADS, 2);

// The range of one norm: a head of q or k, or (whole) all of q or all of k.
struct NormPart {
  long long row;
  int head, width;  // first head; number of values
};
DEVICE NormPart norm_part(long long item, int heads, int kv, int dim, int whole) {
  const int parts = whole ? 2 : heads + kv, part = (int)(item % parts);
  if (!whole) return {item / parts, part, dim};
  return {item / parts, part ? heads : 0, (part ? kv : heads) * dim};
}

// The norm weights of a head: shared by all heads, or (whole) its own.
DEVICE const real* head_weights(const real* wq, const real* wk, int head, int heads, int dim, int whole) {
  const real* w = head < heads ? wq : wk;
  return whole ? w + (head < heads ? head : head - heads) * dim : w;
}

DEVICE void scale_pairs(FlatPack& a, FlatPack& b, float by) {
#pragma unroll
  for (int j = 0; j < V; ++j) a.v[j] *= by, b.v[j] *= by;
}

// rstd of each q and k head; with `whole`, one value for all q heads and one for all k heads.
KERNEL_WARP(head_rstd)(float* rstd, const real* x, int rows, int heads, int kv, int dim, int whole, float eps) {
  const NormPart part = norm_part(WARP_INDEX, heads, kv, dim, whole);
  if (part.row >= rows) return;
  const float scale = rstd_of_head(x + (part.row * (heads + 2 * kv) + part.head) * dim, part.width, eps);
  float* to = rstd + part.row * (heads + kv) + part.head;
  for (int i = LANE; i < part.width / dim; i += LANES) to[i] = scale;
}

// y = x, normed (if rstd is given) and rotated; sign -1 rotates back. Bit 0 of D: add to y; bit 1: half a head is a whole number
// of packs; bit 2, MORE: a head is rotated in part, or q is scaled.
KERNEL_FLAT(rope_apply, D=0,1,2,3,4,5,6,7)(real* y, const real* x, MAYBE(const float) cosine, MAYBE(const float) sine,
                                           MAYBE(const float) q_scale, const int* position, MAYBE(const float) rstd,
                                           MAYBE(const real) wq, MAYBE(const real) wk, int rows, int heads, int kv, int dim,
                                           int turned, int whole, float plus, int once, float sign) {
  constexpr bool ADD = D & 1, WHOLE = D & 2, MORE = D & 4;
  constexpr int HEADS = WHOLE ? ROPE_HEADS : 1;
  const int packs = packs_of_head<MORE>(dim, turned), all = heads + 2 * kv, rotated = heads + kv;
  const int threads = packs * ((all + HEADS - 1) / HEADS);  // per row
  const long long item = FLAT_INDEX, row = item / threads;
  if (row >= rows) return;
  const int rest = (int)(item - row * threads), first = rest / packs * HEADS;
  const HeadPairs at = head_pairs<MORE>(rest % packs, dim, turned);
  const long long head0 = (row * all + first) * dim;
  FlatPack a[HEADS], b[HEADS], c = {}, s = {};
#pragma unroll
  for (int k = 0; k < HEADS; ++k) {
    const int there = first + k < all ? at.n : 0;
    a[k] = half_pack<WHOLE>(x + head0 + k * dim + at.a, there);
    b[k] = half_pack<WHOLE>(x + head0 + k * dim + at.b, there);
  }
  const bool turns = !MORE || at.angle >= 0;
  if (first < rotated && turns) {
    const long long p = (long long)position[row] * ((MORE ? turned : dim) / 2) + at.angle;
    c = half_pack<WHOLE>(cosine + p, at.n);
    s = half_pack<WHOLE>(sine + p, at.n);
  }
#pragma unroll
  for (int k = 0; k < HEADS; ++k) {
    const int head = first + k, there = head < all ? at.n : 0;
    if (head < rotated) {
      if (rstd)
        norm_pairs<WHOLE>(a[k], b[k], head_weights(wq, wk, head, heads, dim, whole), at, rstd[row * rotated + head], plus,
                          once);
      if (turns) rotate(a[k], b[k], c, s, sign);
      if (MORE && q_scale && head < heads) scale_pairs(a[k], b[k], q_scale[position[row]]);
    }
    real *to = y + head0 + k * dim + at.a, *other = y + head0 + k * dim + at.b;
    if constexpr (WHOLE) {
      if (ADD) {
        const FlatPack more = half_pack<true>((const real*)to, there), too = half_pack<true>((const real*)other, there);
#pragma unroll
        for (int j = 0; j < V; ++j) a[k].v[j] += more.v[j], b[k].v[j] += too.v[j];
      }
      put(to, packed<real>(a[k]), there);
      put(other, packed<real>(b[k]), there);
    } else {
      store(to, a[k], at.n, ADD);
      store(other, b[k], at.n, ADD);
    }
  }
}

// Rotates (bit 0 of D: and norms) the q heads of qkv in place and writes k (rotated) and v of each row to row slots[row] of the
// cache; slot -1: nowhere. A head is read completely (its sum needs it) before any of it is written; where the norm is over all
// heads, `norms` holds head_rstd's values. Bit 1 of D: MORE, as above.
KERNEL_WARP(rope_append, D=0,1,2,3)(INOUT(real) qkv, INOUT(real) cache, MAYBE(const float) cosine, MAYBE(const float) sine,
                                    MAYBE(const float) q_scale, const int* position, const int* slots, MAYBE(const float) norms,
                                    MAYBE(const real) wq, MAYBE(const real) wk, int rows, int heads, int kv, int dim, int turned,
                                    float eps, float plus, int once) {
  constexpr bool NORM = D & 1, MORE = D & 2;
  const int all = heads + 2 * kv;
  const long long item = WARP_INDEX, row = item / all;
  const int head = (int)(item % all);
  if (row >= rows) return;
  real* x = qkv + item * dim;
  real* to = x;
  if (head >= heads) {
    const int slot = slots[row];
    if (slot < 0) return;
    to = cache + (long long)slot * 2 * kv * dim + (head - heads) * dim;
  } else if (MORE && !NORM && turned == 0 && !q_scale) {
    return;  // q is unchanged
  }
  const bool rotated = head < heads + kv;
  float rstd = 1.f;
  if (NORM && rotated) rstd = norms ? norms[row * (heads + kv) + head] : rstd_of_head(x, dim, eps);
  const long long p = (long long)position[row] * ((MORE ? turned : dim) / 2);
  const int packs = packs_of_head<MORE>(dim, turned);
  for (int pack = LANE; pack < packs; pack += LANES) {
    const HeadPairs at = head_pairs<MORE>(pack, dim, turned);
    FlatPack a = load<V>(x + at.a, at.n), b = load<V>(x + at.b, at.n);
    if (NORM && rotated) norm_pairs(a, b, head_weights(wq, wk, head, heads, dim, norms ? 1 : 0), at, rstd, plus, once);
    if (rotated && (!MORE || at.angle >= 0))
      rotate(a, b, load<V>(cosine + p + at.angle, at.n), load<V>(sine + p + at.angle, at.n), 1.f);
    if (MORE && q_scale && head < heads) scale_pairs(a, b, q_scale[position[row]]);
    store(to + at.a, a, at.n);
    store(to + at.b, b, at.n);
  }
}

// dx of the normed q and k heads, in place: on entry d holds the gradient of n (already rotated back).
KERNEL_WARP(head_norm_bwd)(INOUT(real) d, const real* x, const float* rstd, const real* wq, const real* wk, int rows,
                           int heads, int kv, int dim, int whole, float plus) {
  const NormPart part = norm_part(WARP_INDEX, heads, kv, dim, whole);
  if (part.row >= rows) return;
  const long long at = (part.row * (heads + 2 * kv) + part.head) * dim;
  const int width = part.width;
  const real* w = part.head < heads ? wq : wk;
  const float scale = rstd[part.row * (heads + kv) + part.head];
  WarpPack dot = {};
  for (int i = WCOL; i < width; i += WARP_STEP) {
    WarpPack e = load_row(d + at, i, width), g = load_row(w, i, width), h = load_row(x + at, i, width);
#pragma unroll
    for (int j = 0; j < WV; ++j) dot.v[j] = fmaf(e.v[j] * (g.v[j] + plus), h.v[j] * scale, dot.v[j]);
  }
  const float mean = pack_sum(dot) / (float)width;
  for (int i = WCOL; i < width; i += WARP_STEP) {
    WarpPack e = load_row(d + at, i, width), g = load_row(w, i, width), h = load_row(x + at, i, width);
#pragma unroll
    for (int j = 0; j < WV; ++j) e.v[j] = scale * (e.v[j] * (g.v[j] + plus) - h.v[j] * scale * mean);
    store(d + at + i, e, width - i);
  }
}

// partial[chunk] = sum of d * h over 64 of the (row, head) pairs of q (first 0, count heads) or k (first heads, count kv). A norm
// over all heads has one head, as wide as all of them together.
KERNEL_WARP(head_norm_dw)(float* partial, const real* d, const real* x, const float* rstd, int rows, int heads, int kv,
                          int dim, int first, int count, int width) {
  const int steps = (width + WARP_STEP - 1) / WARP_STEP;
  const long long warp = WARP_INDEX, items = (long long)rows * count;
  const long long chunk = warp / steps;
  const int i = (int)(warp % steps) * WARP_STEP + WCOL;
  if (chunk * SUM_ROWS >= items) return;
  const long long end = chunk * SUM_ROWS + SUM_ROWS < items ? chunk * SUM_ROWS + SUM_ROWS : items;
  WarpPack acc = {};
  for (long long item = chunk * SUM_ROWS; item < end; ++item) {
    const long long row = item / count;
    const int head = first + (int)(item % count);
    const long long at = row * (heads + 2 * kv) * dim + (long long)head * dim;
    const float scale = rstd[row * (heads + kv) + head];
    WarpPack e = load_row(d + at, i, width), h = load_row(x + at, i, width);
#pragma unroll
    for (int j = 0; j < WV; ++j) acc.v[j] = fmaf(e.v[j], h.v[j] * scale, acc.v[j]);
  }
  store(partial + chunk * width + i, acc, width - i);
}
