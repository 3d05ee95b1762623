// Causal attention, level 3: tiles of keys.
//
// Changes  A block of 128 queries copies 32 keys and values at a time into shared memory, where each is read 128 times. The
//          softmax processes eight scores per step: one maximum and one rescaling of o for all eight.
// Math     as attention_2.cu, eight scores at a time
// Shapes   as attention_2.cu
// Plan     one thread per query row; all threads read the same address of a tile, four floats at a time, which costs one access
// Numerics as attention_2.cu, but l and o are rescaled once per eight keys
// Cost     4 D flops a pair; one load for eight flops, so the float units come near their limit. H100, bf16, 112 heads of 2048,
//          2026-11-27: 19.6 TFLOP/s, 0.025 of the ceiling of 800 (25 predicted). sm_90a: 206 registers, no spills.
#include "prim/block.cuh"
#include "prim/math.cuh"

constexpr int DIM = 64, QUERIES = 128, KEYS = 32, STEP = 8;  // KEYS per tile, STEP per step of the softmax

struct alignas(16) Four {
  float v[4];
};

KERNEL(level_attention_3, THREADS=128, SHARED=2 * 32 * 64 * 4)
(real* o, const real* q, const real* k, const real* v, int heads, int t, float scale) {
  Four* tk = (Four*)shared_base();   // KEYS rows of DIM floats
  Four* tv = tk + KEYS * DIM / 4;
  const int first = blockIdx.x * QUERIES, i = first + threadIdx.x;  // rows of the head
  const long long base = (long long)blockIdx.y * t * DIM;            // the head
  float x[DIM], sum[DIM], m = NEG_INF, l = 0.f;
#pragma unroll
  for (int d = 0; d < DIM; ++d) {
    x[d] = to_float(q[base + (long long)i * DIM + d]) * scale;
    sum[d] = 0.f;
  }
  for (int j0 = 0; j0 < first + QUERIES; j0 += KEYS) {
    block_sync();  // all threads have finished the previous tile
    for (int e = threadIdx.x; e < KEYS * DIM; e += QUERIES) {
      ((float*)tk)[e] = to_float(k[base + (long long)j0 * DIM + e]);
      ((float*)tv)[e] = to_float(v[base + (long long)j0 * DIM + e]);
    }
    block_sync();
#pragma unroll 1
    for (int c = 0; c < KEYS; c += STEP) {
      float s[STEP], largest = m;
#pragma unroll
      for (int j = 0; j < STEP; ++j) {
        s[j] = 0.f;
#pragma unroll
        for (int d = 0; d < DIM; d += 4) {
          const Four key = tk[((c + j) * DIM + d) / 4];
#pragma unroll
          for (int e = 0; e < 4; ++e) s[j] = fmaf(x[d + e], key.v[e], s[j]);
        }
        if (j0 + c + j > i) s[j] = NEG_INF;
        largest = max2(largest, s[j]);
      }
      const float alpha = exp_f(m - largest);
      m = largest;
      l *= alpha;
#pragma unroll
      for (int d = 0; d < DIM; ++d) sum[d] *= alpha;
#pragma unroll
      for (int j = 0; j < STEP; ++j) {
        const float p = exp_f(s[j] - m);
        l += p;
#pragma unroll
        for (int d = 0; d < DIM; d += 4) {
          const Four value = tv[((c + j) * DIM + d) / 4];
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[d + e] = fmaf(p, value.v[e], sum[d + e]);
        }
      }
    }
  }
#pragma unroll
  for (int d = 0; d < DIM; ++d) o[base + (long long)i * DIM + d] = to_real(sum[d] / l);
}
