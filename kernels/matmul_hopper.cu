// The engine's own matrix product on Hopper (sm_90a): the same function, and the same bits, as matmul.cu.
//
// Math     C = op(A) op(B) (+ bias) (+ R), in the layouts of matmul.cu; R real is C itself where C accumulates
// Shapes   A, B real by tensor map: nt A [m,k] boxes of 128 rows, B [n,k] boxes of D rows; nn B [k,n] boxes of 64 rows; tn A
//          [k,m] boxes of 64 rows. C [m,n] real by tensor map, boxes of 64 rows, or float (names in _float) with row stride
//          ldc; bias [n] real. Rows begin at multiples of 16 bytes.
// Plan     A persistent block owns 128 x D of C at a time. One thread of its first warpgroup keeps a ring of stages full by
//          TMA (128-byte swizzle, k 64 a stage); the other two warpgroups multiply 64 x D each by wgmma and release a stage
//          when the next one's products are under way. Real C goes through shared memory to TMA, R comes the same way while
//          the tile is multiplied. Tiles are taken in groups of `group` rows, column by column, so that neighbours share L2.
// Numerics As matmul.cu: one chain of float sums over k in steps of 16, the same bits whatever D (measured on an H100).
// Cost     2 m n k flops; (m k + k n + m n) x sizeof bytes.
#include "prim/wgmma.cuh"
#include "prim/tile.cuh"

// Stages of the ring, and the block's shared memory: the ring, a tile of real C, 512 bytes of barriers.
EXPORT_FN(hopper_stages, d, d == 256 ? 3 : d == 192 ? 4 : 5);
EXPORT_FN(hopper_float_stages, d, d == 256 ? 4 : d == 192 ? 5 : 6);
EXPORT_FN(hopper_shared, d, hopper_stages(d) * (128 + d) * 128 + 128 * d * 2 + 512);
EXPORT_FN(hopper_float_shared, d, hopper_float_stages(d) * (128 + d) * 128 + 512);

#if defined(REAL_BF16) && defined(HOPPER)
constexpr int ROWS = 128, DEPTH = 64;  // of a tile; of a stage

// Where tile t of tm x tn lies.
DEVICE void place(int t, int tm, int tn, int group, int& i, int& j) {
  const int per = group * tn, g = t / per, first = g * group, rest = tm - first;
  const int size = rest < group ? rest : group, r = t - g * per;
  i = first + r % size;
  j = r / size;
}

template <int TRANS, int D, bool FLOAT_OUT>
DEVICE void hopper_product(const tensor_map& a, const tensor_map& b, const tensor_map* c, const tensor_map* residual, float* cf,
                           const real* bias, int m, int n, int k, int ldc, int accumulate, int group) {
  constexpr bool AK = TRANS != TN, BK_CONTIGUOUS = TRANS == NT;
  constexpr int STAGES = FLOAT_OUT ? hopper_float_stages(D) : hopper_stages(D);
  bf16* sa = (bf16*)shared_base();           // STAGES x 128 x 64
  bf16* sb = sa + STAGES * ROWS * DEPTH;     // STAGES x D x 64
  bf16* sc = sb + STAGES * D * DEPTH;        // 128 x D, boxes of 64 x 64 (real C only)
  mbarrier* full = (mbarrier*)(sc + (FLOAT_OUT ? 0 : ROWS * D));
  mbarrier *empty = full + STAGES, *loaded = empty + STAGES;  // loaded: R of each consumer
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 2);
    }
    for (int i = 0; i < 2; ++i) mbarrier_init(loaded + i, 1);
    mbarrier_fence();
  }
  block_sync();
  const int tm = (m + ROWS - 1) / ROWS, tn = (n + D - 1) / D, steps = (k + DEPTH - 1) / DEPTH;
  int stage = 0, phase = 0;
  auto next = [&] {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };

  if (warpgroup == 0) {
    registers_dec<40>();
    if (threadIdx.x != 0) return;
    for (int t = blockIdx.x; t < tm * tn; t += gridDim.x) {
      int i, j;
      place(t, tm, tn, group, i, j);
      for (int q = 0; q < steps; ++q, next()) {
        mbarrier_wait(empty + stage, phase ^ 1);
        mbarrier* arrived = full + stage;
        mbarrier_expect(arrived, (ROWS + D) * DEPTH * 2);
        bf16 *ta = sa + stage * ROWS * DEPTH, *tb = sb + stage * D * DEPTH;
        if (AK)
          tma_load(ta, &a, arrived, q * DEPTH, i * ROWS);
        else
          for (int x = 0; x < ROWS; x += 64) tma_load(ta + x * DEPTH, &a, arrived, i * ROWS + x, q * DEPTH);
        if (BK_CONTIGUOUS)
          tma_load(tb, &b, arrived, q * DEPTH, j * D);
        else
          for (int x = 0; x < D; x += 64) tma_load(tb + x * DEPTH, &b, arrived, j * D + x, q * DEPTH);
      }
    }
    return;
  }

  registers_inc<232>();
  const int w = warpgroup - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  unsigned char* out = (unsigned char*)(sc + w * 64 * D);
  int loads = 0;
  for (int t = blockIdx.x; t < tm * tn; t += gridDim.x) {
    int i, j;
    place(t, tm, tn, group, i, j);
    const int row0 = i * ROWS + w * 64, col0 = j * D;
    if (!FLOAT_OUT && thread == 0) {
      tma_wait_read<0>();  // the tile before has left `out`
      if (residual) {
        mbarrier_expect(loaded + w, 64 * D * 2);
        for (int x = 0; x < D; x += 64) tma_load(out + x * 128, residual, loaded + w, col0 + x, row0);
      }
    }
    float d[D / 2];
    int last = -1;
    for (int q = 0; q < steps; ++q, next()) {
      mbarrier_wait(full + stage, phase);
      const bf16 *ta = sa + stage * ROWS * DEPTH + w * 64 * DEPTH, *tb = sb + stage * D * DEPTH;
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < DEPTH; kk += 16)
        wgmma_ss<D, !AK, !BK_CONTIGUOUS>(d, wgmma_desc<AK>(ta + (AK ? kk : kk * 64)),
                                         wgmma_desc<BK_CONTIGUOUS>(tb + (BK_CONTIGUOUS ? kk : kk * 64)), q + kk > 0);
      wgmma_commit();
      if (last >= 0) {
        wgmma_wait<1>();
        if (thread == 0) mbarrier_arrive(empty + last);
      }
      last = stage;
    }
    wgmma_wait<0>();
    if (thread == 0) mbarrier_arrive(empty + last);

    if (bias) {
#pragma unroll
      for (int x = 0; x < D / 8; ++x)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = col0 + x * 8 + lane % 4 * 2 + e;
          const float v = col < n ? to_float(bias[col]) : 0.f;
          d[4 * x + e] += v;
          d[4 * x + 2 + e] += v;
        }
    }
    if (FLOAT_OUT) {
      const Target<float> to(cf, nullptr, m, n, ldc, accumulate);
#pragma unroll
      for (int x = 0; x < D / 8; ++x)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          to.put(row0 + warp * 16 + lane / 4 + h * 8, col0 + x * 8 + lane % 4 * 2, d[4 * x + 2 * h], d[4 * x + 2 * h + 1]);
    } else {
      if (residual)
        mbarrier_wait(loaded + w, loads++ & 1);
      else
        named_barrier(1 + w, 128);  // thread 0 has waited for `out`
#pragma unroll
      for (int x = 0; x < D / 8; x += 2) {
        // Tiles of 8 x 8: rows 0 and 8 of this warp's 16, then the same of the next 8 columns.
        unsigned char* at = out + x / 8 * 8192 + swizzle128(warp * 16 + lane / 8 % 2 * 8 + lane % 8, x % 8 + lane / 16);
        unsigned r[4];
        if (residual) {
          ldmatrix4<false>(r, at);
#pragma unroll
          for (int y = 0; y < 4; ++y) {
            d[4 * x + 2 * y] += to_float(bf16{(unsigned short)(r[y] & 0xffffu)});
            d[4 * x + 2 * y + 1] += to_float(bf16{(unsigned short)(r[y] >> 16)});
          }
        }
#pragma unroll
        for (int y = 0; y < 4; ++y) r[y] = pack_bf16(d[4 * x + 2 * y], d[4 * x + 2 * y + 1]);
        stmatrix4(at, r);
      }
      fence_async_proxy();
      named_barrier(1 + w, 128);
      if (thread == 0) {
        for (int x = 0; x < D && col0 + x < n; x += 64) tma_store(c, out + x * 128, col0 + x, row0);
        tma_commit();
      }
    }
  }
  if (!FLOAT_OUT && thread == 0) tma_wait<0>();
}
#endif

// C and R real. R is read where `accumulate` is set.
KERNEL(hopper_nt, D=128,192,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& a, const tensor_map& b, const tensor_map& c,
       const tensor_map& residual, MAYBE(const real) bias, int m, int n, int k, int accumulate, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NT, D, false>(a, b, &c, accumulate ? &residual : nullptr, nullptr, bias, m, n, k, 0, 0, group);
#endif
}

KERNEL(hopper_nn, D=128,192,256, THREADS=384, SHARED=hopper_shared(D), HOT)(const tensor_map& a, const tensor_map& b, const tensor_map& c,
       const tensor_map& residual, MAYBE(const real) bias, int m, int n, int k, int accumulate, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NN, D, false>(a, b, &c, accumulate ? &residual : nullptr, nullptr, bias, m, n, k, 0, 0, group);
#endif
}

KERNEL(hopper_nt_float, D=128,192,256, THREADS=384, SHARED=hopper_float_shared(D), HOT)(const tensor_map& a, const tensor_map& b, float* c,
       MAYBE(const real) bias, int m, int n, int k, int ldc, int accumulate, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<NT, D, true>(a, b, nullptr, nullptr, c, bias, m, n, k, ldc, accumulate, group);
#endif
}

KERNEL(hopper_tn_float, D=128,192,256, THREADS=384, SHARED=hopper_float_shared(D), HOT)(const tensor_map& a, const tensor_map& b, float* c,
       MAYBE(const real) bias, int m, int n, int k, int ldc, int accumulate, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  hopper_product<TN, D, true>(a, b, nullptr, nullptr, c, bias, m, n, k, ldc, accumulate, group);
#endif
}
