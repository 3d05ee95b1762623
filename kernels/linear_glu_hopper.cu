// A linear layer and the gated unit around it, each in one product on Hopper (sm_90a): forward behind gate|up, backward behind down.
//
// Math     hopper_glu_nt: y = act(g) * u with g|u = A W^T (+ bias), W's rows g above u
//          hopper_glu_nn: dy = A W; y = act(g) * u, g becomes dy u act'(g), u becomes dy act(g)
// Shapes   nt: A [m, k] real by tensor map, boxes of a tile's rows; W [2 f, k], boxes of 64 rows; gate and up (the halves of the columns
//          of [m, 2 f], stored if `keep`) and y [m, f] real, boxes of 16 rows; bias [2 f] real. nn: A [m, k]; W [k, f], boxes of 64
//          rows; gate, up (gate_up is their memory) and y as above, y stored if `keep`. f is a multiple of 8.
// Plan     A persistent block has two consumers, and each owns every second tile of 128 (nt: or 192) x 128 of the product (nt: 64 columns
//          of g and the same 64 of u, so one thread holds both of a pair): one multiplies while the other computes activations, which
//          take about as long. matmul_hopper.cu's consumers share a tile and end it together, and then nobody multiplies. The ring is
//          filled in the order of the tiles, and a consumer passes the turn on with its last products under way. Every warp stores its
//          own rows by TMA, 64 columns at a time. nn: a warp has two pairs of boxes for g and u; both are loaded while it still
//          multiplies, and the gradients leave from where g and u came.
// Numerics As matmul.cu followed by activation.cu: one chain over k; g, u and dy are rounded to real before they are used.
// Cost     2 m n k flops, n = 2 f or f; nt (m k + 2 f k + 3 m f) x sizeof bytes, nn (m k + f k + 4 m f, with y 5 m f). *Predicted* for an
//          H100, 16,384 x 896 x 9,728: nt 380 us (products 355, L2 354; hopper_nt 390 + glu_fwd 175 measured), nn 270 us (L2 236, memory
//          233; hopper_nn 209 + glu_bwd 267). A warp's end of a tile of 128 rows is 3,280 instructions in nt, 7,200 in nn, beside
//          7,168 cycles of the other consumer's products; of 192 rows 5,090 beside 10,752, not all hidden. Not measured; the
//          arithmetic: docs/kernels.md.
#include "common/activate.cuh"
#include "common/hopper_turns.cuh"

// D of nt is 8 x (rows of a tile / 64) + the activation, D of nn the activation. Stages of the ring; the block's shared memory: the
// ring, boxes of 16 x 64 (two or six a warp), barriers.
EXPORT_FN(glu_halves, d, d < 8 ? 2 : d / 8);
EXPORT_FN(glu_boxes, d, d < 8 ? 6 : 2);
EXPORT_FN(glu_stages, d, d / 8 == 2 ? 6 : 4);
EXPORT_FN(glu_shared, d, glu_stages(d) * turns_ring(glu_halves(d) * 64) + 8 * glu_boxes(d) * 2048 + TURNS_BARRIERS);

#if defined(REAL_BF16) && defined(HOPPER)
DEVICE float low(unsigned pair) { return to_float(bf16{(unsigned short)(pair & 0xffffu)}); }
DEVICE float high(unsigned pair) { return to_float(bf16{(unsigned short)(pair >> 16)}); }

template <int ACT, int HALVES>
struct GluForward : TileEnd {
  const tensor_map *gate, *up, *y;
  const real* bias;
  int m, f, keep;

  template <class Value>
  DEVICE_MEMBER void put(const tensor_map* map, int row, int col, int lane, Value value) {
    TileEnd::put(map, row, col, lane, value, [](unsigned char*) {});
  }

  DEVICE_MEMBER void finish(const TilePlace& at, int lane, float (&d)[HALVES][64]) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      const int row = at.row + h * 64;
      if (row >= m) continue;
      float(&v)[64] = d[h];  // g, then u
      if (bias) {
#pragma unroll
        for (int c = 0; c < 8; ++c)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = at.col + c * 8 + lane % 4 * 2 + e;
            const float g = col < f ? to_float(bias[col]) : 0.f, u = col < f ? to_float(bias[f + col]) : 0.f;
            v[4 * c + e] += g;
            v[4 * c + 2 + e] += g;
            v[32 + 4 * c + e] += u;
            v[32 + 4 * c + 2 + e] += u;
          }
      }
      auto g = [&](int c, int y) { return pack_bf16(v[4 * c + 2 * y], v[4 * c + 2 * y + 1]); };
      auto u = [&](int c, int y) { return pack_bf16(v[32 + 4 * c + 2 * y], v[32 + 4 * c + 2 * y + 1]); };
      if (keep) {
        put(gate, row, at.col, lane, g);
        put(up, row, at.col, lane, u);
      }
      put(y, row, at.col, lane, [&](int c, int y) {
        const unsigned gg = g(c, y), uu = u(c, y);
        float a, b, slope;
        activate<ACT>(low(gg), a, slope);
        activate<ACT>(high(gg), b, slope);
        return pack_bf16(a * low(uu), b * high(uu));
      });
    }
  }
};

// Boxes: g and u of even parts, of odd ones; y of even parts, of odd ones.
template <int ACT>
struct GluBackward : TileEnd {
  const tensor_map *gate, *up, *y;
  const real* gate_up;
  int m, f, keep;

  // A warp's rows of a tile in four parts of 16 x 64: the upper half's columns, then the lower half's.
  DEVICE_MEMBER void load(const TilePlace& at, int part) const {
    unsigned char* box = boxes + part % 2 * 4096;
    mbarrier_expect(loaded + part % 2, 4096);
    tma_load(box, gate, loaded + part % 2, at.col + part % 2 * 64, at.row + part / 2 * 64);
    tma_load(box + 2048, up, loaded + part % 2, at.col + part % 2 * 64, at.row + part / 2 * 64);
  }

  // Loads the first two parts, and asks for the others.
  DEVICE_MEMBER void halfway(const TilePlace& at, int lane) const {
    if (lane == 0) {
      tma_wait_read<0>();
      load(at, 0);
      load(at, 1);
    }
    warp_sync();
    const int row = at.row + 64 + lane / 2, col = at.col + lane % 2 * 64;
    if (row < m && col < f) {
      prefetch_l2(gate_up + (long long)row * 2 * f + col);
      prefetch_l2(gate_up + (long long)row * 2 * f + f + col);
    }
  }

  DEVICE_MEMBER void finish(const TilePlace& at, int lane, float (&d)[2][64]) const {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = at.row + part / 2 * 64, col = at.col + part % 2 * 64;
      unsigned char *box_g = boxes + part % 2 * 4096, *box_u = box_g + 2048, *box_y = boxes + (4 + part % 2) * 2048;
      mbarrier_wait(loaded + part % 2, part / 2);
#pragma unroll
      for (int x = 0; x < 8; x += 2) {
        if (x == 2 && (part == 1 || part == 2)) {  // the part before this one has left its boxes by now, that of y too
          if (lane == 0) {
            tma_wait_read<0>();
            load(at, part + 1);
          }
          warp_sync();
        }
        unsigned g[4], u[4], r[4];
        ldmatrix4<false>(g, box_g + box_at(lane, x));
        ldmatrix4<false>(u, box_u + box_at(lane, x));
#pragma unroll
        for (int y = 0; y < 4; ++y) {
          const int c = part % 2 * 32 + 4 * x + 2 * y;
          const unsigned dy = pack_bf16(d[part / 2][c], d[part / 2][c + 1]);
          const float g0 = low(g[y]), g1 = high(g[y]), u0 = low(u[y]), u1 = high(u[y]);
          float a0, a1, s0, s1;
          activate<ACT>(g0, a0, s0);
          activate<ACT>(g1, a1, s1);
          g[y] = pack_bf16(low(dy) * u0 * s0, high(dy) * u1 * s1);
          u[y] = pack_bf16(low(dy) * a0, high(dy) * a1);
          r[y] = pack_bf16(a0 * u0, a1 * u1);
        }
        stmatrix4(box_g + box_at(lane, x), g);
        stmatrix4(box_u + box_at(lane, x), u);
        if (keep) stmatrix4(box_y + box_at(lane, x), r);
      }
      fence_async_proxy();
      warp_sync();
      if (lane == 0 && row < m && col < f) {
        tma_store(gate, box_g, col, row);
        tma_store(up, box_u, col, row);
        if (keep) tma_store(y, box_y, col, row);
        tma_commit();
      }
    }
  }
};
#endif

// Sizes of the grid of tiles and steps of k come from the host, which leaves a register for each.
KERNEL(hopper_glu_nt, D=16,17,18,24,25,26, THREADS=384, SHARED=glu_shared(D), HOT)(const tensor_map& a, const tensor_map& w,
       const tensor_map& gate, const tensor_map& up, const tensor_map& y, MAYBE(const real) bias, int m, int f, int tm, int tn,
       int steps, int keep, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  const auto load = [&](bf16* to, mbarrier* arrived, int q, int j) {
    tma_load(to, &w, arrived, q * DEPTH, j * 64);
    tma_load(to + 64 * DEPTH, &w, arrived, q * DEPTH, f + j * 64);
  };
  tiles_in_turns<NT, glu_halves(D), glu_stages(D), glu_boxes(D), 64>(
      a, tm, tn, steps, group, load, GluForward<D % 8, glu_halves(D)>{{}, &gate, &up, &y, bias, m, f, keep});
#endif
}

KERNEL(hopper_glu_nn, D=0,1,2, THREADS=384, SHARED=glu_shared(D), HOT)(const tensor_map& a, const tensor_map& w,
       const tensor_map& gate, const tensor_map& up, const tensor_map& y, INOUT(real) gate_up, int m, int f, int tm, int tn,
       int steps, int keep, int group) {
#if defined(REAL_BF16) && defined(HOPPER)
  const auto load = [&](bf16* to, mbarrier* arrived, int q, int j) {
    tma_load(to, &w, arrived, j * 128, q * DEPTH);
    tma_load(to + 64 * DEPTH, &w, arrived, j * 128 + 64, q * DEPTH);
  };
  tiles_in_turns<NN, glu_halves(D), glu_stages(D), glu_boxes(D), 128>(
      a, tm, tn, steps, group, load, GluBackward<D>{{}, &gate, &up, &y, gate_up, m, f, keep});
#endif
}
