// Finds where two arrays differ in any bit: checks a library product against the engine's own.
//
// Math     differ[r, s] = 1 if any bit of segment s of row r differs, else 0
// Shapes   a, b: rows of `bytes` bytes, lda and ldb bytes apart;  differ [rows, ceil(bytes / 1024)]
// Plan     One thread per segment of 1024 bytes; it reads words where both segments are aligned to 4 bytes.
// Numerics Exact: bits are compared, so -0 differs from 0 and a NaN equals itself.
// Cost     One read of a and b. It runs once for each plan of the library, never in a step that repeats: not tuned.
#include "prim/vec.cuh"

// Bytes covered by one entry of `differ`.
EXPORT(int, COMPARE_SEGMENT, 1024);

KERNEL_FLAT(rows_differ)(unsigned* differ, const unsigned char* a, const unsigned char* b, int rows, long long bytes,
                         long long lda, long long ldb) {
  const long long segments = (bytes + COMPARE_SEGMENT - 1) / COMPARE_SEGMENT, i = FLAT_INDEX;
  if (i >= rows * segments) return;
  const long long row = i / segments, from = i % segments * COMPARE_SEGMENT;
  const long long n = bytes - from < COMPARE_SEGMENT ? bytes - from : COMPARE_SEGMENT;
  const unsigned char *p = a + row * lda + from, *q = b + row * ldb + from;
  unsigned any = 0;
  long long j = 0;
  if ((((unsigned long long)p | (unsigned long long)q) & 3) == 0)
    for (; j + 4 <= n; j += 4) any |= *(const unsigned*)(p + j) ^ *(const unsigned*)(q + j);
  for (; j < n; ++j) any |= (unsigned)(p[j] ^ q[j]);
  differ[i] = any != 0;
}
