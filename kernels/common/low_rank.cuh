// The low-rank terms of a product, as further steps of its sums after the last step of k (matmul_few.cu, lora_hopper.cu).
#pragma once
#include "prim/kernel.cuh"

// A step: up to `chunk` ranks of one segment.
template <class B>
struct LowStep {
  B b;     // the segment's B_i
  int t;   // its first column in t
  int r;   // its first rank in B_i
  int at;  // the segment's column at which the tile begins, negative if the tile begins before the segment
  int ranks, size, rank;  // ranks from here on; the segment's columns and ranks
};

// Segment i, columns [start, end) of C, adds t_i B_i^T; its columns in t [m, R] begin where those of the segment before it end.
// Absent segments are empty. B says where B_i is.
template <class B>
struct LowRank {
  static constexpr bool ANY = true;
  B b[3];
  int start[3], end[3], rank[3];
  DEVICE_MEMBER LowRank(B b0, B b1, B b2, int start0, int end0, int rank0, int start1, int end1, int rank1, int start2, int end2,
                        int rank2)
      : b{b0, b1, b2}, start{start0, start1, start2}, end{end0, end1, end2}, rank{rank0, rank1, rank2} {}
  // Step x of the tile of columns [from, to); false past the last.
  DEVICE_MEMBER bool step(int x, int from, int to, int chunk, LowStep<B>& s) const {
    bool found = false;
    int t = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int steps = start[i] < to && end[i] > from ? (rank[i] + chunk - 1) / chunk : 0;
      if (x >= 0 && x < steps) {
        const int r = x * chunk;
        s = {b[i], t + r, r, from - start[i], rank[i] - r, end[i] - start[i], rank[i]};
        found = true;
      }
      x -= steps;
      t += rank[i];
    }
    return found;
  }
};

struct NoLowRank {
  static constexpr bool ANY = false;
};
