// The matrix product on CPUs, in float: the counterpart of the GPU's library product. Compiled once for each vector width that
// build/cpu.rs names; src/device/cpu/gemm.rs chooses at run time.
//
// Math     c[i][j] = sum_t a(i, t) b(t, j), or += with `add`
// Shapes   a: `m` rows of A, b: `n` columns of B, each either `along_k` (the k values of a row or column are contiguous) or not
//          (for each t the values of all rows or columns are contiguous); c [m, n]. Strides in floats.
// Plan     The columns are taken in blocks of at most 512 (COLUMNS), k in pieces of 256: a block of B is packed once, as panels
//          of NR columns, [k][NR], and stays in L2. Tiles of MR rows of A are packed as [k][AW] (for few columns they are read in
//          place) and go over the panels. C's tile of MR x NR stays in registers. For few rows (decoding) all of A is packed
//          first, and B is packed one panel at a time, which fits L1.
// Numerics An element is one chain of fused multiply-adds along k from 0 in pieces of 256, whose sums are added from left to
//          right. So its bits depend on its row and its column alone: not on m, n, tile, cut, thread or vector width.
// Cost     2 m n k flops. One core with AVX-512: see benches/results/2026-11-27-cpu.md.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// VL: floats per register; MR: rows of a tile; AW: floats per packed row of A's tile.
#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12, AW = 16;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6, AW = 8;
#else
constexpr int VL = 4, MR = 8, AW = 8;
#endif
constexpr int NR = 2 * VL;
constexpr size_t PIECE = 256, COLUMNS = 512, NARROW = 768, FEW_ROWS = 64, DIRECT_ROWS = 4;

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

typedef float Vector __attribute__((vector_size(4 * VL)));

inline Vector load(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < VL; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

#if defined(__AVX2__)
// Transposes 8 x 8: line[t][i] = src[i][t].
inline void turn8(__m256 line[8], const float* src, size_t stride) {
  __m256 half[8], pair[8];
  for (int i = 0; i < 4; ++i) {
    const float *upper = src + i * stride, *lower = upper + 4 * stride;
    half[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)), _mm_loadu_ps(lower), 1);
    half[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)), _mm_loadu_ps(lower + 4), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(half[i], half[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(half[i], half[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    line[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    line[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    line[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    line[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
}
#endif

// Packs an operand into panels of WIDTH rows, of which `height` are used: dst[panel][t][i] = element t of row panel height + i,
// for t < k and rows < count. A panel takes `size` floats. Unused rows are left as they are: their results are never stored in C.
template <int WIDTH>
void pack(float* dst, size_t size, const float* src, size_t stride, bool along_k, size_t count, size_t height, size_t k) {
  if (!along_k) {
    for (size_t t = 0; t < k; ++t, dst += WIDTH, src += stride)
      for (size_t first = 0, panel = 0; first < count; first += height, panel += size) {
        const size_t rows = count - first < height ? count - first : height;
        if (rows == WIDTH) memcpy(dst + panel, src + first, WIDTH * sizeof(float));
        else if (rows == MR) memcpy(dst + panel, src + first, MR * sizeof(float));
        else for (size_t i = 0; i < rows; ++i) dst[panel + i] = src[first + i];
      }
    return;
  }
  for (size_t first = 0; first < count; first += height, dst += size)
    for (size_t i = 0; i < height && first + i < count; i += 8) {
      const float* from = src + (first + i) * stride;
      const size_t left = smaller(count - first, height) - i, rows = left < 8 ? left : 8;
      size_t t = 0;
#if defined(__AVX2__)
      if (rows == 8)
        for (; t + 8 <= k; t += 8) {
          __m256 line[8];
          turn8(line, from + t, stride);
          for (int u = 0; u < 8; ++u) _mm256_storeu_ps(dst + (t + u) * WIDTH + i, line[u]);
        }
#endif
      for (size_t r = 0; r < rows; ++r)
        for (size_t u = t; u < k; ++u) dst[u * WIDTH + i + r] = from[r * stride + u];
    }
}

// R rows and W vectors of columns of C, of which `columns` are stored. A is a packed tile, or (ALONG) R rows of A in place, `lda`
// apart.
template <int R, int W, bool ALONG>
void tile(const float* a, size_t lda, const float* b, int k, float* c, size_t ldc, int columns, bool add) {
  Vector sum[R][W] = {};
  // One pointer per three rows: base, base + lda and base + 2 lda are addressing modes of one instruction.
  const float* rows[(R + 2) / 3];
  for (int i = 0; i < (R + 2) / 3; ++i) rows[i] = ALONG ? a + 3 * i * lda : a;
  for (int t = 0; t < k; ++t, b += NR) {
    Vector x[W];
    for (int w = 0; w < W; ++w) x[w] = load(b + w * VL);
    for (int r = 0; r < R; ++r) {
      const Vector s = (ALONG ? rows[r / 3][r % 3 * lda] : a[r]) - Vector{};
      for (int w = 0; w < W; ++w) sum[r][w] = fma(s, x[w], sum[r][w]);
    }
    if (ALONG) for (int i = 0; i < (R + 2) / 3; ++i) ++rows[i];
    else a += AW;
  }
  for (int r = 0; r < R; ++r, c += ldc) {
    if (columns == W * VL) {
      for (int w = 0; w < W; ++w) store(c + w * VL, add ? load(c + w * VL) + sum[r][w] : sum[r][w]);
    } else {
      float line[W * VL];
      for (int w = 0; w < W; ++w) store(line + w * VL, sum[r][w]);
      for (int j = 0; j < columns; ++j) c[j] = add ? c[j] + line[j] : line[j];
    }
  }
}

template <int R, bool ALONG>
inline void rows_tile(int rows, const float* a, size_t lda, const float* b, int k, float* c, size_t ldc, int columns, bool add) {
  if constexpr (R > 1)
    if (rows < R) return rows_tile<R - 1, ALONG>(rows, a, lda, b, k, c, ldc, columns, add);
  if (columns <= VL) tile<R, 1, ALONG>(a, lda, b, k, c, ldc, columns, add);
  else tile<R, 2, ALONG>(a, lda, b, k, c, ldc, columns, add);
}

// This thread's buffer for packed operands, aligned to a cache line.
float* work(size_t floats) {
  static thread_local std::vector<float> memory;
  if (memory.size() < floats + 16) memory.resize(floats + 16);
  return (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
}

}  // namespace

// Must match `Product` in src/device/cpu/gemm.rs.
struct Product {
  const float *a, *b;
  float* c;
  size_t lda, ldb, ldc, m, n, k;
  unsigned a_along_k, b_along_k, add;
};

namespace {

#if defined(__AVX2__)
// R rows times groups of 8 columns of B that are contiguous along k, without packing: an 8 x 8 transpose turns columns into
// lanes.
template <int R, int GROUPS>
void direct(const Product& p, size_t j) {
  const size_t of_row = p.a_along_k ? p.lda : 1, of_t = p.a_along_k ? 1 : p.lda;
  for (size_t from = 0; from < p.k; from += PIECE) {
    const size_t to = smaller(from + PIECE, p.k);
    __m256 sum[GROUPS][R] = {};
    const auto add_lines = [&](int g, const __m256* line, size_t t, int depth) {
      for (int u = 0; u < depth; ++u)
        for (int r = 0; r < R; ++r)
          sum[g][r] = _mm256_fmadd_ps(_mm256_broadcast_ss(p.a + r * of_row + (t + u) * of_t), line[u], sum[g][r]);
    };
    size_t t = from;
    for (; t + 8 <= to; t += 8)
      for (int g = 0; g < GROUPS; ++g) {
        const float* b = p.b + (j + 8 * g) * p.ldb + t;
        // Prefetches the next columns. A line of 16 values is requested once, by every other step of 8.
        for (int i = 0; i < 8; i += 2)
          __builtin_prefetch(b + (8 * GROUPS + i + (t / 8 & 1)) * p.ldb);
        __m256 line[8];
        turn8(line, b, p.ldb);
        add_lines(g, line, t, 8);
      }
    for (; t < to; ++t)
      for (int g = 0; g < GROUPS; ++g) {
        const float* b = p.b + (j + 8 * g) * p.ldb + t;
        const __m256 line = {b[0], b[p.ldb], b[2 * p.ldb], b[3 * p.ldb], b[4 * p.ldb], b[5 * p.ldb], b[6 * p.ldb], b[7 * p.ldb]};
        add_lines(g, &line, t, 1);
      }
    for (int g = 0; g < GROUPS; ++g)
      for (int r = 0; r < R; ++r) {
        float* c = p.c + r * p.ldc + j + 8 * g;
        _mm256_storeu_ps(c, p.add || from ? _mm256_add_ps(_mm256_loadu_ps(c), sum[g][r]) : sum[g][r]);
      }
  }
}

// Returns the number of columns it has done.
template <int R>
size_t directly(const Product& p) {
  if constexpr (R > 1)
    if (p.m < R) return directly<R - 1>(p);
  size_t j = 0;
  for (; j + 32 <= p.n; j += 32) direct<R, 4>(p, j);
  for (; j + 8 <= p.n; j += 8) direct<R, 1>(p, j);
  return j;
}
#endif

void packed(const Product& p) {
  // Tiles of nearly equal height, blocks of nearly equal width.
  const size_t height = ceil_div(p.m, ceil_div(p.m, MR));
  const bool few = p.m <= FEW_ROWS;
  // Packing A costs 1 / n of the product. For few columns A is read in place, unless its rows fall on the same lines of L1.
  const bool along = !few && p.a_along_k && p.n <= NARROW && p.lda % 1024 != 0;
  const size_t width = few ? NR : ceil_div(ceil_div(p.n, ceil_div(p.n, COLUMNS)), NR) * NR;
  const size_t group = few ? p.m : 4 * height;  // rows of A that are packed together
  const size_t depth_of_a = few ? p.k : PIECE, of_b = width * PIECE, of_a = ceil_div(group, height) * depth_of_a * AW;
  float *panels = work(of_b + of_a), *tiles = panels + of_b;
  const auto pack_rows = [&](size_t i, size_t t, size_t depth) {
    const float* from = p.a_along_k ? p.a + i * p.lda + t : p.a + t * p.lda + i;
    pack<AW>(tiles, depth_of_a * AW, from, p.lda, p.a_along_k, smaller(group, p.m - i), height, depth);
  };
  if (few) pack_rows(0, 0, p.k);
  for (size_t j = 0; j < p.n; j += width) {
    const size_t columns = smaller(width, p.n - j);
    for (size_t t = 0; t < p.k; t += PIECE) {
      const size_t depth = smaller(PIECE, p.k - t);
      const float* from = p.b_along_k ? p.b + j * p.ldb + t : p.b + t * p.ldb + j;
      pack<NR>(panels, NR * PIECE, from, p.ldb, p.b_along_k, columns, NR, depth);
      for (size_t i = 0; i < p.m; i += group) {
        if (!few && !along) pack_rows(i, t, depth);
        const float* tile = few ? tiles + t * AW : tiles;
        for (size_t ii = i; ii < smaller(i + group, p.m); ii += height, tile += depth_of_a * AW)
          for (size_t jj = 0; jj < columns; jj += NR) {
            const int rows = (int)smaller(height, p.m - ii), wide = (int)smaller(NR, columns - jj);
            const float* panel = panels + jj * PIECE;
            float* c = p.c + ii * p.ldc + j + jj;
            const bool add = p.add || t > 0;
            if (along) rows_tile<MR, true>(rows, p.a + ii * p.lda + t, p.lda, panel, (int)depth, c, p.ldc, wide, add);
            else rows_tile<MR, false>(rows, tile, 0, panel, (int)depth, c, p.ldc, wide, add);
          }
      }
    }
  }
}

}  // namespace

extern "C" void PRODUCT_NAME(const Product* product) {
  Product p = *product;
  if (p.k == 0 && !p.add)
    for (size_t i = 0; i < p.m; ++i) memset(p.c + i * p.ldc, 0, p.n * sizeof(float));
  if (p.m == 0 || p.n == 0 || p.k == 0) return;
#if defined(__AVX2__)
  if (p.m <= DIRECT_ROWS && p.b_along_k) {
    const size_t done = directly<DIRECT_ROWS>(p);
    p.b += done * p.ldb;
    p.c += done;
    p.n -= done;
    if (p.n == 0) return;
  }
#endif
  packed(p);
}
