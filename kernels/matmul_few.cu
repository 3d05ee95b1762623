// Products of few rows, as in a decoding step: the weight goes by once, and nothing else counts.
//
// Math     few_nt: C = X W^T (+ bias) (+ C);  few_glu: y = act(g) * u with g|u = X W^T (+ bias), W's rows g above u;
//          few_lora_nt: C = X W^T (+ bias) + t Bd^T (lora.cu)
// Shapes   X [m, k] real, m up to D; W [n, k] (few_glu: [2 f, k]) real; C [m, n] real or float, y [m, f] real;
//          bias [n] or [2 f] real; t [m, R] and B_i as in lora.cu; row strides ldx, ldw, ldc, ldy, ldt. bf16 only.
// Plan     A warp owns 16 columns (few_glu: 8 of g and the same 8 of u) and all m rows, over the whole of k: one chain, so k
//          cannot be shared out. `warps` of a block are such; few where n is small, so that every multiprocessor has some,
//          and then the block's other warps do the copies. Four stages of cp.async of 8 << shift of k each, long where
//          warps are few: what counts is bytes under way, some 20 KB a multiprocessor. ldmatrix, mma.sync m16n8k16; the
//          fragments of the next 16 of k are read while this one's product runs, whose latency bounds a long k. few_lora_nt's
//          last stages are t and the rows of each B_i whose segment overlaps the block's columns.
// Numerics As matmul.cu: one chain of float sums over k in steps of 16, bias added in float, one rounding when stored; so the
//          bits of matmul_nt, whatever m. few_glu rounds g and u to real first, as glu_fwd finds them, and has its bits. few_lora_nt
//          has those of lora_nt and hopper_lora_nt, with the ranks that lora_hopper.cu asks for.
// Cost     The weight once: n k sizeof bytes; X once a block, from L2. At least 33 cycles for each 16 of k. H100, 2026-11-27, 16 rows:
//          n 896, k 4,864 20.4 us, n 9,728, k 896 13.5 us, few_glu 12.5 us, where 9 and 8.5 were predicted: each of the few
//          copying threads took some 28 instructions a copy, 2,000 cycles a stage, in which the products took 1,300. Now
//          about 5; *predicted* 9, 9 and 9 us, not measured. few_lora_nt, rank 16: one stage more than few_nt, 0.3 us, *predicted*.
#include "common/activate.cuh"
#include "common/few_rows.cuh"
#include "common/low_rank.cuh"
#include "prim/tile.cuh"

EXPORT(int, FEW_STAGES, 4);
// Columns that a warp owns.
EXPORT(int, FEW_COLS, 16);
// The most rows.
EXPORT(int, FEW_ROWS, 64);

#ifdef REAL_BF16
// Byte offset of the 16-byte piece `piece` of a row of (1 << shift) pieces; the xor spreads the eight rows that one ldmatrix
// reads over all banks.
DEVICE int few_at(int row, int piece, int shift) { return ((row << shift) + (piece ^ (row & 7))) << 4; }

template <int D>
struct FewFragments {
  unsigned x[D / 16][4], w[4];
  // `high`: rows from tw to the warp's other rows of W.
  DEVICE_MEMBER void load(const unsigned char* tx, const unsigned char* tw, int high, int kk, int shift) {
    const int lane = threadIdx.x % 32, eight = lane / 8 % 2, upper = lane / 16, r = lane % 8;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) ldmatrix4<false>(x[i], tx + few_at(i * 16 + eight * 8 + r, kk / 8 + upper, shift));
    ldmatrix4<false>(w, tw + few_at(upper * high + r, kk / 8 + eight, shift));
  }
};

template <int D>
DEVICE void few_multiply(float (&acc)[D / 16][2][4], const FewFragments<D>& f) {
  const unsigned w[2][2] = {{f.w[0], f.w[1]}, {f.w[2], f.w[3]}};
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_bf16(acc[i][j], f.x[i], w[j]);
}

// This thread's share of a stage's copies of `rows` rows: from `low` on, and past `half` of them from `high` on; rows outside are
// zeros. Eight threads copy 128 bytes of a row, then the next 128: these lie at constant distances on both sides, so a copy that is not at
// an edge is one instruction. (With twenty, the few threads that copy took longer than the products.)
DEVICE void few_copy(unsigned char* tile, const Matrix& a, int low, int high, int half, int rows, int k0, int copier, int copiers,
                     int shift) {
  const int piece = copier % 8, turns = 1 << (shift - 3), col = k0 + piece * 8;
  const bool inside = a.aligned && k0 + (8 << shift) <= a.cols;
  for (int r = copier / 8; r < rows; r += copiers / 8) {
    const int row = r < half ? low + r : high + r - half;
    unsigned char* to = tile + few_at(r, piece, shift);
    if (inside && (unsigned)row < (unsigned)a.rows) {
      const bf16* p = a.p + (long long)row * a.ld + col;
#pragma unroll 4
      for (int t = 0; t < turns; ++t, to += 128, p += 64) copy_async16(to, p, 16);
    } else {
      for (int t = 0; t < turns; ++t) a.chunk((bf16*)(to + 128 * t), row < 0 ? a.rows : row, col + 64 * t);
    }
  }
}

// This warp's sums, with 8 rows of W from each of the block's two halves: from row `low` and from row `high`. `terms`: the low-rank
// terms after the last step, with the rows of `t` in place of x's; then high = low + half.
template <int D, class Terms>
DEVICE void few_sums(float (&acc)[D / 16][2][4], const Matrix& x, const Matrix& w, int low, int high, int k, int warps,
                     int shift, const Matrix& t, const Terms& terms) {
  const int half = FEW_COLS / 2 * warps, columns = 2 * half, chunk = 8 << shift, stage = (D + columns) * chunk * 2;
  const int steps = (k + chunk - 1) / chunk, warp = threadIdx.x / 32;
  // Who copies: the warps that have nothing to multiply; all where there are none.
  const int copiers = blockDim.x > 32 * warps ? blockDim.x - 32 * warps : blockDim.x;
  const int copier = (int)threadIdx.x - ((int)blockDim.x - copiers);
  unsigned char* shared = shared_base();
  LowStep<const real*> s = {};
  int all = steps;
  if constexpr (Terms::ANY)
    while (terms.step(all - steps, low, low + columns, chunk, s)) ++all;
  auto start = [&](int step) {
    if (step < steps && copier >= 0) {
      unsigned char* tile = shared + step % FEW_STAGES * stage;
      // Rows past X's are zeros, which stay: every stage gets them once.
      few_copy(tile, x, 0, 0, D, step < FEW_STAGES ? D : x.rows, step * chunk, copier, copiers, shift);
      few_copy(tile + D * chunk * 2, w, low, high, half, columns, step * chunk, copier, copiers, shift);
    }
    if constexpr (Terms::ANY)
      if (step >= steps && copier >= 0 && terms.step(step - steps, low, low + columns, chunk, s)) {
        unsigned char* tile = shared + step % FEW_STAGES * stage;
        few_copy(tile, t, 0, 0, D, step < FEW_STAGES ? D : t.rows, s.t, copier, copiers, shift);
        few_copy(tile + D * chunk * 2, Matrix(s.b, s.rank, s.size, s.rank), s.at, s.at + half, half, columns, s.r, copier, copiers,
                 shift);
      }
    copy_commit();  // also when empty, so that the wait below always counts the same
  };
  for (int s = 0; s < FEW_STAGES - 1; ++s) start(s);
  for (int step = 0; step < all; ++step) {
    copy_wait<FEW_STAGES - 2>();
    block_sync();
    start(step + FEW_STAGES - 1);
    if (warp >= warps) continue;
    const unsigned char* tx = shared + step % FEW_STAGES * stage;
    const unsigned char* tw = tx + (D + warp * (FEW_COLS / 2)) * chunk * 2;  // of the low half
    int left = k - step * chunk;
    if constexpr (Terms::ANY)
      if (step >= steps && terms.step(step - steps, low, low + columns, chunk, s)) left = s.ranks;
    const int end = left < chunk ? left : chunk;
    FewFragments<D> one, other;
    one.load(tx, tw, half, 0, shift);
#pragma unroll 2
    for (int kk = 0; kk < end; kk += 32) {  // what lies beyond k is zero
      other.load(tx, tw, half, kk + 16, shift);
      few_multiply<D>(acc, one);
      if (kk + 32 < end) one.load(tx, tw, half, kk + 32, shift);
      few_multiply<D>(acc, other);
    }
  }
  copy_wait<0>();
}

// Stores a warp's sums: two groups of 8 columns, `half` apart, of the block's from n0 on.
template <int D, class T>
DEVICE void few_put(const float (&acc)[D / 16][2][4], const Target<T>& to, int n0, int half) {
  const int lane = threadIdx.x % 32, row = lane / 4, col = n0 + (int)threadIdx.x / 32 * (FEW_COLS / 2) + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) to.put(row + i * 16 + h * 8, col + j * half, acc[i][j][2 * h], acc[i][j][2 * h + 1]);
}
#endif

KERNEL(few_nt, D=16,32,64, BLOCKS=32:3, HOT, WAITS)(MAYBE(real) c, MAYBE(float) cf, const real* x, const real* w, MAYBE(const real) bias, int m, int n,
                    int k, int ldx, int ldw, int ldc, int accumulate, int warps, int shift, int ahead, int wave) {
#ifdef REAL_BF16
  const int n0 = blockIdx.x * warps * FEW_COLS, warp = threadIdx.x / 32;
  float acc[D / 16][2][4] = {};
  const int half = FEW_COLS / 2 * warps;
  const Matrix weight(w, ldw, n, k);
  prefetch_rows(w, ldw, n0, n0 + half, half, n, ahead, wave);
  wait_for_previous();
  const Matrix rows(x, ldx, m, k);
  few_sums<D>(acc, rows, weight, n0, n0 + half, k, warps, shift, rows, NoLowRank());
  if (warp >= warps) return;
  if (cf) few_put<D>(acc, Target<float>(cf, bias, m, n, ldc, accumulate), n0, half);
  else few_put<D>(acc, Target<real>(c, bias, m, n, ldc, accumulate), n0, half);
#else
  wait_for_previous();
#endif
}

// k is at least 1.
KERNEL(few_lora_nt, D=16,32,64, BLOCKS=16:2, HOT, WAITS)(real* c, const real* x, const real* w, MAYBE(const real) bias, const real* t, const real* b0,
                    MAYBE(const real) b1, MAYBE(const real) b2, int m, int n, int k, int ranks, int ldx, int ldw, int ldc, int ldt,
                    int warps, int shift, int ahead, int wave, int start0, int end0, int rank0, int start1, int end1, int rank1, int start2, int end2,
                    int rank2) {
#ifdef REAL_BF16
  const int n0 = blockIdx.x * warps * FEW_COLS;
  float acc[D / 16][2][4] = {};
  const int half = FEW_COLS / 2 * warps;
  const Matrix weight(w, ldw, n, k);
  prefetch_rows(w, ldw, n0, n0 + half, half, n, ahead, wave);
  wait_for_previous();
  const LowRank<const real*> terms(b0, b1, b2, start0, end0, rank0, start1, end1, rank1, start2, end2, rank2);
  few_sums<D>(acc, Matrix(x, ldx, m, k), weight, n0, n0 + half, k, warps, shift, Matrix(t, ldt, m, ranks), terms);
  if ((int)threadIdx.x / 32 < warps) few_put<D>(acc, Target<real>(c, bias, m, n, ldc, false), n0, half);
#else
  wait_for_previous();
#endif
}

KERNEL(few_glu, D=16,32,64, HOT, WAITS)(real* y, const real* x, const real* w, MAYBE(const real) bias, int m, int f, int k, int ldx,
                     int ldw, int ldy, int activation, int warps, int shift, int ahead, int wave) {
#ifdef REAL_BF16
  constexpr int HALF = FEW_COLS / 2;
  const int f0 = blockIdx.x * warps * HALF, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float acc[D / 16][2][4] = {};
  const Matrix weight(w, ldw, 2 * f, k);
  prefetch_rows(w, ldw, f0, f + f0, HALF * warps, 2 * f, ahead, wave);
  wait_for_previous();
  // Columns past f, in the last block, are sums of other rows: they are not stored.
  const Matrix rows(x, ldx, m, k);
  few_sums<D>(acc, rows, weight, f0, f + f0, k, warps, shift, rows, NoLowRank());
  if (warp >= warps) return;
  const int col = f0 + warp * HALF + lane % 4 * 2;
  const Target<real> to(y, nullptr, m, f, ldy, false);
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i * 16 + h * 8 + lane / 4;
      float g[2], u[2], v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        g[e] = acc[i][0][2 * h + e];
        u[e] = acc[i][1][2 * h + e];
        if (bias && col + e < f) {
          g[e] += to_float(bias[col + e]);
          u[e] += to_float(bias[f + col + e]);
        }
        v[e] = gated(activation, round_real(g[e]), round_real(u[e]));
      }
      to.put(row, col, v[0], v[1]);
    }
#else
  wait_for_previous();
#endif
}
