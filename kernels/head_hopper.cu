// The head on Hopper (sm_90a) without logits in memory: their statistics, and their gradient, at the end of the product's tiles.
//
// Math     l = x W^T, stored if requested. hopper_head_parts: of each part of a row (common/logit_parts.cuh), max l, sum e^d, sum
//          e^d d with d = scale (l - max), and the first column of max; the logit of the row's target.
//          hopper_head_grad: dl = up (1[target] - p) - by_entropy p (l - lse + H) with p = e^{scale l - lse}, up = slope a,
//          by_entropy = slope b, a and b the upstreams of log p(target) and of H: head_grad of the same l.
// Shapes   x [m, k] real by tensor map, boxes of a tile's rows; W [vocab, k], boxes of 128 rows; parts [m, tn, 4] float, tn = vocab /
//          128 rounded up; target [m] int, target_logit, lse, entropy, a, b [m] float; logits [m, vocab] float, if requested; dl [m,
//          vocab] real, boxes of 16 rows. vocab is a multiple of 8.
// Plan     common/hopper_turns.cuh: one consumer multiplies while the other ends its tile of 64 D x 128. A lane has 32 logits of each of
//          its rows, and shares a row's part with three lanes. The target is looked for only by warps whose tile has it. head_join and
//          head_stats (head.cu), or sample_join (sample.cu), go on from `parts`. The gradient is the end of a second product.
// Numerics The chain over k of matmul.cu, then the sums and the gradient of head.cu: the same bits as with logits in memory.
// Cost     2 m vocab k flops each; parts 16 bytes for 128 logits, dl 2 a logit. *Predicted* for an H100, 16,384 x 151,936, k 896: 5.8 ms
//          for the statistics (measured apart: product 7.3, head.cu 3.65), 5.9 if logits are stored, and 6.0 for the gradient (product
//          again 7.3, head_grad 5.0). A warp's end of a tile: docs/kernels.md. Not measured.
#include "common/hopper_turns.cuh"
#include "common/logit_parts.cuh"

static_assert(LOGIT_PART == 128, "the columns of a tile in common/hopper_turns.cuh");
// D: rows of a tile / 64. Stages of the ring; the block's shared memory.
EXPORT_FN(head_stages, d, d == 2 ? 6 : 4);
EXPORT_FN(head_shared, d, head_stages(d) * turns_ring(d * 64) + 8 * 2 * 2048 + TURNS_BARRIERS);

#if defined(REAL_BF16) && defined(HOPPER)
// The 32 logits of row y * 8 that this lane has among a warp's sums d[0..63]: group c of 8 columns, column e of the lane's pair. Their
// columns differ in bits 6 to 3 (c) and 0 (e).
struct LaneLogits {
  const float (&d)[64];
  int y;
  DEVICE_MEMBER float at(int c, int e) const { return d[4 * c + 2 * y + e]; }
};

// The sum of a part over the four lanes that share it, from this lane's sums over bit 6: s[c][e].
DEVICE float part_of_tile(float (&s)[8][2]) {
  float by_column[2];
#pragma unroll
  for (int e = 0; e < 2; ++e)  // bits 5, 4, 3
    by_column[e] = ((s[0][e] + s[4][e]) + (s[2][e] + s[6][e])) + ((s[1][e] + s[5][e]) + (s[3][e] + s[7][e]));
  float v = by_column[0] + by_column[1];  // bit 0
  v += shfl_xor(v, 2);                    // bit 2
  return v + shfl_xor(v, 1);              // bit 1
}

// The logit of column t of the tile, in the lane that has it.
DEVICE float logit_of(const LaneLogits& l, int t, int lane) {
  float z = 0.f;
#pragma unroll
  for (int c = 0; c < 16; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e) z = c * 8 + lane % 4 * 2 + e == t ? l.at(c, e) : z;
  return z;
}

template <int HALVES>
struct HeadParts : TileEnd {
  float *parts, *target_logit, *logits;
  const int* target;
  int m, vocab, tn;
  float scale;

  DEVICE_MEMBER void finish(const TilePlace& at, int lane, float (&d)[HALVES][64]) const {
    if (at.col + LOGIT_PART > vocab) {
#pragma unroll
      for (int h = 0; h < HALVES; ++h)
#pragma unroll
        for (int c = 0; c < 64; ++c)
          if (at.col + c / 4 * 8 + lane % 4 * 2 + c % 2 >= vocab) d[h][c] = NEG_INF;
    }
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      if (at.row + h * 64 >= m) continue;
      if (logits) {
#pragma unroll
        for (int c = 0; c < 32; ++c) {
          const int row = at.row + h * 64 + lane / 4 + c % 2 * 8, col = at.col + c / 2 * 8 + lane % 4 * 2;
          if (row < m && col < vocab) *(Two<float>*)(logits + (long long)row * vocab + col) = {d[h][2 * c], d[h][2 * c + 1]};
        }
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) row_end(at, at.row + h * 64 + lane / 4 + y * 8, lane, {d[h], y});
    }
  }

  DEVICE_MEMBER void row_end(const TilePlace& at, int row, int lane, const LaneLogits& l) const {
    const int t = target && row < m ? target[row] - at.col : -1;
    float largest = NEG_INF;
#pragma unroll
    for (int c = 0; c < 16; ++c) largest = max_fast(largest, max_fast(l.at(c, 0), l.at(c, 1)));
    largest = max_fast(largest, shfl_xor(largest, 1));
    largest = max_fast(largest, shfl_xor(largest, 2));
    int first = LOGIT_PART;
#pragma unroll
    for (int c = 15; c >= 0; --c)
#pragma unroll
      for (int e = 1; e >= 0; --e) first = l.at(c, e) == largest ? c * 8 + e : first;
    first += lane % 4 * 2;
    const int other = shfl_xor(first, 1), less = first < other ? first : other, others = shfl_xor(less, 2);
    first = at.col + (less < others ? less : others);
    if (first >= vocab || first >= at.col + LOGIT_PART) first = 0;  // NaNs alone
    const float top = scaled_top(largest, scale);
    float sum[8][2], mean[8][2];
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const LogitSums terms = pair_of_terms(l.at(c, e), l.at(c + 8, e), scale, top);
        sum[c][e] = terms.sum;
        mean[c][e] = terms.mean;
      }
    const float s = part_of_tile(sum), e = part_of_tile(mean);
    if (lane % 4 == 0 && row < m)
      *(Four*)(parts + ((long long)row * tn + at.col / LOGIT_PART) * TILE_STATS) = {largest, s, e, (float)first};
    if (warp_any((unsigned)t < (unsigned)LOGIT_PART)) {
      const float z = logit_of(l, t, lane);
      if ((unsigned)t < (unsigned)LOGIT_PART && t / 2 % 4 == lane % 4) target_logit[row] = z;
    }
  }
};

template <int HALVES>
struct HeadGrad : TileEnd {
  const tensor_map* dl;
  const int* target;
  const float *lse, *entropy, *a, *b;
  int m, vocab;
  float scale, slope;

  DEVICE_MEMBER LogitGradient gradient(int row) const {
    return {scale, lse[row], -(a[row] * slope), b ? entropy[row] : 0.f, b ? -(b[row] * slope) : 0.f};
  }

  DEVICE_MEMBER void finish(const TilePlace& at, int lane, float (&d)[HALVES][64]) {
    if (b)
      finish_with<true>(at, lane, d);
    else
      finish_with<false>(at, lane, d);
  }

  template <bool ENTROPY>
  DEVICE_MEMBER void finish_with(const TilePlace& at, int lane, float (&d)[HALVES][64]) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      const int first = at.row + h * 64, row = first + lane / 4;
      if (first >= m) continue;
      // Rows past the end repeat the last one, and are not stored.
      const int rows[2] = {row < m ? row : m - 1, row + 8 < m ? row + 8 : m - 1};
      const LogitGradient grad[2] = {gradient(rows[0]), gradient(rows[1])};
      const int t[2] = {target[rows[0]] - at.col, target[rows[1]] - at.col};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (at.col + half * 64 >= vocab) continue;
        const auto value = [&](int c, int y) {
          const float* l = d[h] + 4 * (half * 8 + c) + 2 * y;
          return pack_bf16(grad[y].template at<ENTROPY>(l[0], false), grad[y].template at<ENTROPY>(l[1], false));
        };
        const auto last = [&](unsigned char* box) {
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const int col = t[y] - half * 64;
            const bool here = (unsigned)col < 64u && col / 2 % 4 == lane % 4;
            if (!warp_any(here)) continue;
            const float z = logit_of({d[h], y}, t[y], lane);
            warp_sync();  // the box is written
            if (here) *((bf16*)(box + swizzle128(y * 8 + lane / 4, col / 8)) + col % 8) = to_bf16(grad[y].template at<ENTROPY>(z, true));
          }
        };
        put(dl, first, at.col + half * 64, lane, value, last);
      }
    }
  }
};
#endif

KERNEL(hopper_head_parts, D=2,3, THREADS=384, SHARED=head_shared(D), HOT)(const tensor_map& x, const tensor_map& w, float* parts,
       MAYBE(float) target_logit, MAYBE(float) logits, MAYBE(const int) target, int m, int vocab, int tm, int tn, int steps, float scale,
       int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  const auto load = [&](bf16* to, mbarrier* arrived, int q, int j) { tma_load(to, &w, arrived, q * DEPTH, j * LOGIT_PART); };
  tiles_in_turns<NT, D, head_stages(D), 2, LOGIT_PART>(x, tm, tn, steps, group, load,
                                                       HeadParts<D>{{}, parts, target_logit, logits, target, m, vocab, tn, scale});
#endif
}

KERNEL(hopper_head_grad, D=2,3, THREADS=384, SHARED=head_shared(D), HOT)(const tensor_map& x, const tensor_map& w, const tensor_map& dl,
       const int* target, const float* lse, MAYBE(const float) entropy, const float* a, MAYBE(const float) b, int m, int vocab,
       int tm, int tn, int steps, float scale, float slope, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  const auto load = [&](bf16* to, mbarrier* arrived, int q, int j) { tma_load(to, &w, arrived, q * DEPTH, j * LOGIT_PART); };
  tiles_in_turns<NT, D, head_stages(D), 2, LOGIT_PART>(x, tm, tn, steps, group, load,
                                                       HeadGrad<D>{{}, &dl, target, lse, entropy, a, b, m, vocab, scale, slope});
#endif
}
