// AdamW with 8-bit moments, in blocks of 256.
//
// Math     m' = map_m[codes_m] absmax_m, v' = map_v[codes_v] absmax_v; the step of adamw.cu on m', v'; then per block absmax =
//          max |m|, code = the entry of the map nearest to m / absmax, and the same for v
//          (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022)
// Shapes   p, g flat n float; w flat n real; codes n bytes each; absmax n / 256 float each; maps [256] float, sorted, with
//          negative values for m, without for v; hyper, key as in adamw.cu. Blocks count from the start of the range
// Plan     A warp owns a block and keeps its moments in registers between reading and writing; a map is searched in 8 steps, its
//          1 KiB stays in L1.
// Numerics float. The step uses the moments before they are rounded to codes. A block that is not whole is divided by absmax (at
//          least 1e-38) instead of multiplied by 1 / absmax, as in bitsandbytes' reference. D as in adamw.cu.
// Cost     D=0: 16 n + sizeof(real) n bytes. *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "common/adam.cuh"
#include "common/quant.cuh"
#include "prim/warp.cuh"

constexpr int BLOCK = CODE8_BLOCK, PARTS = BLOCK / WARP_STEP;  // packs per lane in a block

// Writes codes and absmax of a block of `count` values; this lane holds one pack of each part.
DEVICE void store_block(unsigned char* codes, float* absmax, const float* map, const WarpPack (&x)[PARTS], int count) {
  WarpPack most = {};
#pragma unroll
  for (int s = 0; s < PARTS; ++s)
#pragma unroll
    for (int j = 0; j < WV; ++j)
      most.v[j] = max2(most.v[j], s * WARP_STEP + WCOL + j < count ? fabsf(x[s].v[j]) : 0.f);
  float a = pack_max(most);
  if (count < BLOCK) a = max2(a, 1e-38f);
  if (LANE == 0) *absmax = a;
  const float scale = code_scale(a);
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    const int i = s * WARP_STEP + WCOL;
    int c[WV];
#pragma unroll
    for (int j = 0; j < WV; ++j)
      c[j] = nearest_code<CODE8_MAP>(map, clamp_one(count < BLOCK ? x[s].v[j] / a : x[s].v[j] * scale));
    store_codes<WV>(codes + i, c, count - i);
  }
}

KERNEL_WARP(adamw8, D=0,1)(MAYBE(float) p, INOUT(real) w, INOUT(unsigned char) m, INOUT(unsigned char) v, INOUT(float) m_absmax,
                           INOUT(float) v_absmax, const float* m_map, const float* v_map, const float* g, const float* hyper,
                           const int* key, long long n, float beta1, float beta2, float eps, float weight_decay, float lr_scale, int group) {
  const long long block = WARP_INDEX, start = block * BLOCK;
  if (start >= n) return;
  const int count = (int)(n - start < BLOCK ? n - start : BLOCK);
  const AdamStep adam(hyper, beta1, beta2, eps, weight_decay, lr_scale);
  const float a = m_absmax[block], b = v_absmax[block];
  WarpPack moment[PARTS], square[PARTS];
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    const int i = s * WARP_STEP + WCOL;
    const long long at = start + i;
    int cm[WV], cv[WV];
    load_codes<WV>(cm, m + at, count - i);
    load_codes<WV>(cv, v + at, count - i);
    WarpPack x = D == 0 ? load<WV>(p + at, count - i) : load<WV>(w + at, count - i);
    WarpPack d = load<WV>(g + at, count - i);
#pragma unroll
    for (int j = 0; j < WV; ++j) {
      moment[s].v[j] = m_map[cm[j]] * a;
      square[s].v[j] = v_map[cv[j]] * b;
      adam.apply(x.v[j], moment[s].v[j], square[s].v[j], d.v[j]);
    }
    if (D == 0) store(p + at, x, count - i);
    if (D == 1 && sizeof(real) == 2)
#pragma unroll
      for (int k = 0; k < WV; k += 8) {
        const Noise noise(key, at + k, group, WEIGHT_NOISE_TAG);
#pragma unroll
        for (int j = 0; j < 8 && k + j < WV; ++j) x.v[k + j] = round_by_chance(x.v[k + j], noise.at((int)(at % 8) + j));
      }
    store(w + at, x, count - i);
  }
  store_block(m + start, m_absmax + block, m_map, moment, count);
  store_block(v + start, v_absmax + block, v_map, square, count);
}
