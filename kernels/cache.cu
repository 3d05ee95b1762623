// Copies inside the paged cache of keys and values: gives a sequence its own copy of the rows of a page that it shares in part.
//
// Math     cache[l][to + i] = cache[l][from + i] for i < rows, in every layer l
// Shapes   cache [layers, slots, width] real; the rows from..from + rows and to..to + rows do not overlap
// Plan     One thread per V values; one launch for all layers instead of one copy per layer.
// Numerics Copies are exact.
// Cost     2 layers rows width sizeof(real) bytes: 63 rows of Qwen2.5-0.5B are 1.5 MB, 2 us, *predicted*.
#include "prim/vec.cuh"

// Copies rows `from`.. of each layer to rows `to`...
KERNEL_FLAT(copy_cached)(INOUT(real) cache, int from, int to, int rows, int slots, int width, int layers) {
  const int packs = (width + V - 1) / V;
  const long long item = FLAT_INDEX;
  if (item >= (long long)layers * rows * packs) return;
  const int column = (int)(item % packs) * V, row = (int)(item / packs % rows);
  real* layer = cache + item / packs / rows * slots * width + column;
  store(layer + (long long)(to + row) * width, load<V>(layer + (long long)(from + row) * width, width - column),
        width - column);
}
