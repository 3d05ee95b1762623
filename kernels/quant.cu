// Weights in 4 and 8 bits: NF4 in blocks of 64 with or without double quantisation, and int8 by rows.
//
// Math     NF4: a = max |x| of a block of 64; code = the entry of a map of 16 values nearest to x / a; x' = map[code] a
//          Double quantisation: offset = mean of all a; a - offset is stored in blocks of 256, by a map of 256 values:
//          a' = map8[code8] a2 + offset   (Dettmers et al., "QLoRA", 2023)
//          int8: a = max |x| of a row, code = round(x (127 (1 / a))), x' = code a / 127   (Dettmers et al., "LLM.int8()", 2022)
// Shapes   x flat n real (int8: [rows, cols]); codes (n + 1) / 2 bytes, the even value in the high half (int8: n bytes, two's
//          complement); absmax n / 64 float, or as many codes8 with absmax2 n / 64 / 256 float and offset [1] float
// Plan     Quantising happens once, at load: one thread per block. Dequantising precedes each product, in one launch for all
//          segments of its weight: a thread owns 8 values, 4 bytes of codes and one scale; the map of 16 values fits one cache
//          line.
// Numerics float, operation for operation as in bitsandbytes' reference in PyTorch, so codes and scales have its bits: a whole
//          block is multiplied by 1 / a; a last block that is not whole is divided by a (which is then at least 1e-38).
//          absmax_mean adds in the order of PyTorch's sum with vectors of 8 on one thread: 4 x 8 columns, each in a cascade of
//          four levels. x' is rounded once, when stored.
// Cost     dequantise: n / 2 + 4 n / 64 bytes read (double: n / 64), n sizeof(real) written. H100, 2026-11-27: nf4_dequantise of
//          two segments of 3,072 x 1,024 to bf16, 16 MB, 10.3 us (11.2 with double quantisation), launch included; one launch per
//          segment took 16.7 (14.8).
#include "common/quant.cuh"
#include "prim/warp.cuh"

// Values per thread of nf4_dequantise and int8_dequantise.
EXPORT(int, DEQUANTISE_PACK, 8);

// One thread per block.
KERNEL_FLAT(nf4_quantise)(unsigned char* codes, float* absmax, const real* x, const float* map, long long n) {
  const long long block = FLAT_INDEX, start = block * NF4_BLOCK;
  if (start >= n) return;
  const int count = (int)(n - start < NF4_BLOCK ? n - start : NF4_BLOCK);
  float a = 0.f;
  for (int i = 0; i < count; ++i) a = max2(a, fabsf(to_float(x[start + i])));
  if (count < NF4_BLOCK) a = max2(a, 1e-38f);
  absmax[block] = a;
  const float scale = code_scale(a);
  for (int i = 0; i < count; i += 2) {
    int pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float v = i + j < count ? to_float(x[start + i + j]) : 0.f;
      pair[j] = nearest_code<NF4_MAP>(map, clamp_one(count < NF4_BLOCK ? v / a : v * scale));
    }
    codes[(start + i) / 2] = (unsigned char)(pair[0] << 4 | pair[1]);
  }
}

// Up to three segments of one weight (blockIdx.y), one below the other in y. The scales of a segment are its absmax, or come from
// scales, map8, absmax and offset.
KERNEL_FLAT(nf4_dequantise, HOT)(real* y, const float* map, MAYBE(const float) map8, const unsigned char* codes0,
                                 MAYBE(const unsigned char) codes1, MAYBE(const unsigned char) codes2,
                                 MAYBE(const float) absmax0, MAYBE(const float) absmax1, MAYBE(const float) absmax2,
                                 MAYBE(const unsigned char) scales0, MAYBE(const unsigned char) scales1,
                                 MAYBE(const unsigned char) scales2, MAYBE(const float) offset0, MAYBE(const float) offset1,
                                 MAYBE(const float) offset2, long long n0, long long n1, long long n2) {
  const int z = blockIdx.y;
  const long long n = z == 0 ? n0 : z == 1 ? n1 : n2, before = z == 0 ? 0 : z == 1 ? n0 : n0 + n1;
  const unsigned char* codes = z == 0 ? codes0 : z == 1 ? codes1 : codes2;
  const float* absmax = z == 0 ? absmax0 : z == 1 ? absmax1 : absmax2;
  const long long i = FLAT_INDEX * DEQUANTISE_PACK;
  if (i >= n) return;
  const long long block = i / NF4_BLOCK;
  float a;
  if (map8) {
    const unsigned char* scales = z == 0 ? scales0 : z == 1 ? scales1 : scales2;
    const float* offset = z == 0 ? offset0 : z == 1 ? offset1 : offset2;
    const float product = map8[scales[block]] * absmax[block / CODE8_BLOCK];
    a = product + offset[0];
  } else {
    a = absmax[block];
  }
  int bytes[4];
  load_codes<4>(bytes, codes + i / 2, (n - i + 1) / 2);
  Pack<DEQUANTISE_PACK> v;
#pragma unroll
  for (int j = 0; j < DEQUANTISE_PACK; ++j) v.v[j] = map[j % 2 ? bytes[j / 2] & 15 : bytes[j / 2] >> 4] * a;
  store(y + before + i, v, n - i);
}

// Quantises x (minus offset, if given) by a sorted map. One thread per block.
KERNEL_FLAT(blockwise8_quantise)(unsigned char* codes, float* absmax, const float* x, MAYBE(const float) offset,
                                 const float* map, long long n) {
  const long long block = FLAT_INDEX, start = block * CODE8_BLOCK;
  if (start >= n) return;
  const int count = (int)(n - start < CODE8_BLOCK ? n - start : CODE8_BLOCK);
  const float shift = offset ? offset[0] : 0.f;
  float a = 0.f;
  for (int i = 0; i < count; ++i) a = max2(a, fabsf(x[start + i] - shift));
  if (count < CODE8_BLOCK) a = max2(a, 1e-38f);
  absmax[block] = a;
  const float scale = code_scale(a);
  for (int i = 0; i < count; ++i) {
    const float v = x[start + i] - shift;
    codes[start + i] = (unsigned char)nearest_code<CODE8_MAP>(map, clamp_one(count < CODE8_BLOCK ? v / a : v * scale));
  }
}

KERNEL_FLAT(blockwise8_dequantise)(float* y, const unsigned char* codes, const float* absmax, const float* map, long long n) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  y[i] = map[codes[i]] * absmax[i / CODE8_BLOCK];
}

// mean[0] = the mean of x. One warp; lane 8 k + v adds up the values 32 r + 8 k + v (with fewer than 8 values lane k takes the
// values 4 r + k).
KERNEL(absmax_mean, THREADS=32)(float* mean, const float* x, int n) {
  const int lane = threadIdx.x, wide = n >= 8 ? 8 : 1, columns = 4 * wide, rows = n / columns;
  int power = 0;
  while (1 << power < rows) ++power;
  power = power / 4 < 4 ? 4 : power / 4;
  const int step = 1 << power;
  float level[4] = {0.f, 0.f, 0.f, 0.f};
  if (lane < columns) {
    int r = 0;
    while (r + step <= rows) {
      for (int j = 0; j < step; ++j, ++r) level[0] += x[r * columns + lane];
#pragma unroll
      for (int j = 1; j < 4; ++j) {
        level[j] += level[j - 1];
        level[j - 1] = 0.f;
        if (r & (step - 1) << (j * power)) break;
      }
    }
    for (; r < rows; ++r) level[0] += x[r * columns + lane];
#pragma unroll
    for (int j = 1; j < 4; ++j) level[0] += level[j];
    // Vectors left over after the last row of columns go to the first column.
    if (lane < wide)
      for (int k = rows * columns + lane; k < n / wide * wide; k += wide) level[0] += x[k];
  }
  float column = level[0];
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    const float other = shfl(level[0], (lane + k * wide) % 32);
    column += other;
  }
  float total = 0.f;
  for (int k = n / wide * wide; k < n; ++k) total += x[k];
  for (int v = 0; v < 8; ++v) {
    const float other = shfl(column, v);
    if (v < wide) total += other;
  }
  if (lane == 0) mean[0] = total / (float)n;
}

// One warp per row of x.
KERNEL_WARP(int8_quantise)(unsigned char* codes, float* absmax, const real* x, int rows, int cols) {
  const long long row = WARP_INDEX;
  if (row >= rows) return;
  const real* from = x + row * cols;
  WarpPack most = {};
  for (int i = WCOL; i < cols; i += WARP_STEP) {
    WarpPack v = load_row(from, i, cols);
#pragma unroll
    for (int j = 0; j < WV; ++j) most.v[j] = max2(most.v[j], fabsf(v.v[j]));
  }
  const float a = pack_max(most);
  if (LANE == 0) absmax[row] = a;
  const float scale = a > 0.f ? 1.f / a * 127.f : 0.f;
  for (int i = WCOL; i < cols; i += WARP_STEP) {
    WarpPack v = load_row(from, i, cols);
    int c[WV];
#pragma unroll
    for (int j = 0; j < WV; ++j) c[j] = (int)rintf(v.v[j] * scale) & 255;
    store_codes<WV>(codes + row * cols + i, c, cols - i);
  }
}

KERNEL_FLAT(int8_dequantise, HOT)(real* y, const unsigned char* codes, const float* absmax, int rows, int cols) {
  const long long packs = (cols + DEQUANTISE_PACK - 1) / DEQUANTISE_PACK, row = FLAT_INDEX / packs;
  const int i = (int)(FLAT_INDEX % packs) * DEQUANTISE_PACK;
  if (row >= rows) return;
  const float a = absmax[row];
  int c[DEQUANTISE_PACK];
  load_codes<DEQUANTISE_PACK>(c, codes + row * cols + i, cols - i);
  Pack<DEQUANTISE_PACK> v;
#pragma unroll
  for (int j = 0; j < DEQUANTISE_PACK; ++j) {
    const float signed_code = (float)(c[j] >= 128 ? c[j] - 256 : c[j]);
    v.v[j] = signed_code * a * 7.874015718698502e-3f;
  }
  store(y + row * cols + i, v, cols - i);
}
