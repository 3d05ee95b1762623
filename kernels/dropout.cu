// Dropout.
//
// Math     y = x / (1 - p) where u >= p, else 0; u uniform in (0, 1) from Philox, one number a value (Srivastava et al., 2014).
//          The backward applies the same to dy: it generates the numbers again, nothing is saved.
// Shapes   x, y flat n real; key [4] int: seed low, seed high, step, micro-step
// Plan     One thread per 4 values, one Philox call.
// Numerics float, rounded once when stored.
// Cost     2 n sizeof(real) bytes. *Predicted* at copy speed, 2.95 TB/s on an H100.
#include "prim/rng.cuh"
#include "prim/vec.cuh"

// Values per thread: the output of one Philox call.
EXPORT(int, DROPOUT_PACK, 4);

KERNEL_FLAT(dropout)(real* y, const real* x, const int* key, int site, float p, long long n, int accumulate) {
  const long long i = FLAT_INDEX * DROPOUT_PACK;
  if (i >= n) return;
  // Counter: index of the four values, then step and micro-step, then the site in the low bits of the tag.
  const Philox r = philox((unsigned)key[0], (unsigned)key[1], (unsigned)(i / DROPOUT_PACK), (unsigned)key[2], (unsigned)key[3],
                          (unsigned)site | DROPOUT_TAG);
  const unsigned u[4] = {r.x, r.y, r.z, r.w};
  const float scale = 1.f / (1.f - p);
  Pack<DROPOUT_PACK> v = load<DROPOUT_PACK>(x + i, n - i);
#pragma unroll
  for (int j = 0; j < DROPOUT_PACK; ++j) v.v[j] = uniform(u[j]) >= p ? v.v[j] * scale : 0.f;
  store(y + i, v, n - i, accumulate);
}
