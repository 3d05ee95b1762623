// Token embedding with a learned prompt: ids past the vocabulary read rows of a second table.
//
// Math     y[i] = scale w[ids[i]] for ids[i] < vocab, else p[ids[i] - vocab]
//          dw, dp: embedding_bwd (kernels/embedding.cu) over the distinct ids of each table
//          (Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021)
// Shapes   w [vocab, d], p [virtual tokens, d] real; ids [n] int; y [n, d] real
// Plan     One warp copies one row.
// Numerics Copies are exact; a scaled row is rounded to real.
// Cost     2 n d sizeof(real). *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "prim/warp.cuh"

KERNEL_WARP(prompt_gather)(real* y, const real* w, const real* p, const int* ids, int n, int vocab, int d,
                           float scale) {
  const long long i = WARP_INDEX;
  if (i >= n) return;
  const int id = ids[i];
  const real* from = id < vocab ? w + (long long)id * d : p + (long long)(id - vocab) * d;
  const float by = id < vocab ? scale : 1.f;
  for (int c = WCOL; c < d; c += WARP_STEP) {
    WarpPack v = load_row(from, c, d);
#pragma unroll
    for (int j = 0; j < WV; ++j) v.v[j] *= by;
    store(y + i * d + c, v, d - c);
  }
}
