// The mask of attention, for all its kernels: where a position's key lies, and which query rows see a key.
#pragma once
#include "prim/math.cuh"
#include "prim/vec.cuh"

// Ints of a row of `segments`.
EXPORT(int, SEGMENT_INTS, 6);
// Positions in a page of the cache, and in a block of a row's chain of attention.
EXPORT(int, PAGE, 64);

DEVICE int max_int(int a, int b) { return a > b ? a : b; }
DEVICE int min_int(int a, int b) { return a < b ? a : b; }

// The first position that a query at `position` sees; a window of w covers w positions, including its own.
DEVICE int first_seen(int position, int window) { return max_int(position - window + 1, 0); }

// The keys of a packed batch: first the positions of the prefix, then the segment's own rows.
struct SegmentKeys {
  int start, prefix_start, prefix_length;
  long long ld;
  DEVICE_MEMBER SegmentKeys(const int* segments, int segment, int ld)
      : start(segments[segment * SEGMENT_INTS]), prefix_start(segments[segment * SEGMENT_INTS + 2]), prefix_length(segments[segment * SEGMENT_INTS + 3]), ld(ld) {}
  DEVICE_MEMBER int position(int row) const { return row - start + prefix_length; }
  DEVICE_MEMBER int row(int p) const { return p < prefix_length ? prefix_start + p : start + p - prefix_length; }
  DEVICE_MEMBER long long at(int p) const { return row(p) * ld; }
};

// The keys of one sequence in a paged cache.
struct PagedKeys {
  const int* pages;
  long long ld;
  DEVICE_MEMBER int row(int p) const { return pages[(unsigned)p / PAGE] * PAGE + (int)((unsigned)p % PAGE); }
  DEVICE_MEMBER long long at(int p) const { return row(p) * ld; }
};

// The rows of a segment that see the key at `position` of their sequence: all from `own_row` on (-1: from the segment's start,
// because the key is in its prefix), as far as the window reaches.
struct QueryRange {
  int from, to;
  DEVICE_MEMBER QueryRange(const int* segments, int segment, int position, int window, int own_row) {
    const int start = segments[segment * SEGMENT_INTS], length = segments[segment * SEGMENT_INTS + 1], prefix = segments[segment * SEGMENT_INTS + 3];
    from = own_row < 0 ? start : own_row;
    // The last position that sees the key is position + window - 1; in 64 bits, because an unlimited window is a very large int.
    const long long last = (long long)position + window - prefix + start;
    to = last < start + length ? (int)last : start + length;
  }
};
