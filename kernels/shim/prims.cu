// The functions of prim/ one by one, for tests/it/prim.rs. CPU only.
//
// Math     prim_unary: y = f(x), f = exp, log, tanh, erf, sigmoid, exp2_fast for which = 0 to 5. prim_philox: y = philox(key,
//          counter)
// Shapes   x, y [n] float;  input [n, 6] (key0, key1, counter 0 to 3), output [n, 4] unsigned
// Plan     one thread per element
// Numerics those of prim/math.cuh
// Cost     nothing; never launched outside the tests
#include "prim/math.cuh"
#include "prim/rng.cuh"

KERNEL_FLAT(prim_unary)(float* y, const float* x, int which, long long n) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const float v = x[i];
  y[i] = which == 0 ? exp_f(v) : which == 1 ? log_f(v) : which == 2 ? tanh_f(v) : which == 3 ? erf_f(v) : which == 4 ? sigmoid_f(v) : exp2_fast(v);
}

KERNEL_FLAT(prim_philox)(unsigned* y, const unsigned* input, long long n) {
  const long long i = FLAT_INDEX;
  if (i >= n) return;
  const unsigned* k = input + i * 6;
  const Philox p = philox(k[0], k[1], k[2], k[3], k[4], k[5]);
  y[i * 4] = p.x;
  y[i * 4 + 1] = p.y;
  y[i * 4 + 2] = p.z;
  y[i * 4 + 3] = p.w;
}
