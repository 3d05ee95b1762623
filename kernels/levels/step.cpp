// One level of the matrix product on a CPU, alone, to step through in gdb (kernels/README.md has the commands):
//   c++ -g -O0 -std=c++17 -w -I kernels -D LEVEL=6 kernels/levels/step.cpp kernels/shim/shim.cpp -o target/step
// LEVEL is 1 to 6. The kernel runs in strict mode on one OS thread, each of its threads as a fiber.
#include <cstdio>
#include <vector>

#include "shim/shim.h"

#define REAL_BF16 1
#define TEMPER_STRICT 1
#define QUOTE(x) #x
#define FILE_OF(n) QUOTE(levels/matmul_##n.cu)
#define NAME_OF(n) level_matmul_##n
#define FILE_NAME(n) FILE_OF(n)
#define NAME(n) NAME_OF(n)
#include FILE_NAME(LEVEL)

int main() {
  const int m = 128, n = 256, k = 64;
  std::vector<real> a(m * k), b(k * n), c(m * n);
  for (int i = 0; i < m * k; ++i) a[i] = to_real((float)(i % 5 - 2));
  for (int i = 0; i < k * n; ++i) b[i] = to_real((float)(i % 7 - 3));

  // The same blocks, threads and shared memory as in src/ops/levels/matmul.rs.
  const int side = LEVEL < 3 ? 0 : LEVEL == 3 ? 32 : 128, threads = LEVEL == 3 ? 1024 : 256;
  char error[1000] = "";
  shim::Launch launch = {};
  launch.grid[0] = side ? n / side : m * n / threads;
  launch.grid[1] = side ? m / side : 1;
  launch.grid[2] = 1;
  launch.block[0] = threads;
  launch.block[1] = launch.block[2] = 1;
  launch.shared_bytes = LEVEL < 3 ? 0 : 49152;
  launch.strict = 1;
  launch.block_end = launch.grid[0] * launch.grid[1];
  launch.error = error;
  launch.error_bytes = sizeof error;
  shim::fibers(launch, [&] { NAME(LEVEL)<0>(c.data(), a.data(), b.data(), m, n, k); });
  if (*error) {
    printf("%s\n", error);
    return 1;
  }

  int wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0.f;
      for (int p = 0; p < k; ++p) sum += to_float(a[i * k + p]) * to_float(b[p * n + j]);
      wrong += to_float(c[i * n + j]) != round_real(sum);
    }
  printf("level %d: %d of %d values are wrong\n", LEVEL, wrong, m * n);
  return wrong != 0;
}
