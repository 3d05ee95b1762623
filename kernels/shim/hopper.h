// The part of shim.cpp behind prim/tma.cuh and prim/wgmma.cuh: mbarriers, bulk copies by tensor map, named barriers, products of
// a warpgroup. Fast mode does each of them at once. Strict mode does it as late as a GPU might: a load lands when a thread waits
// for its mbarrier and is poison until then; a store reads shared memory, and a product its operands and accumulators, when its
// thread waits for it; both see shared memory as it was at the last proxy fence.
#pragma once

namespace shim {
namespace {

bool strict() { return worker->launch->strict; }

// Never returns: the launch has failed.
void stop(const char* text) {
  fail(text);
  to_scheduler(AT_BARRIER);
}

long long shared_offset(const void* p) { return (const unsigned char*)p - worker->shared; }

void expect_shared(const char* what, const void* p, size_t bytes, size_t align) {
  Worker& w = *worker;
  if (!strict()) return;
  const unsigned char* at = (const unsigned char*)p;
  const bool inside = at >= w.shared && at + bytes <= w.shared + w.launch->shared_bytes;
  if (inside && shared_offset(p) % (long long)align == 0) return;
  char text[240];
  snprintf(text, sizeof text, "%s of thread %u at byte %lld of shared memory, %zu bytes (the launch has %u): ", what, w.current,
           shared_offset(p), bytes, w.launch->shared_bytes);
  const size_t n = strlen(text);
  if (inside)
    snprintf(text + n, sizeof text - n, "not a multiple of %zu", align);
  else
    snprintf(text + n, sizeof text - n, "outside");
  stop(text);
}

// The byte at p as TMA stores and wgmma see it.
const unsigned char* seen(const void* p) {
  return strict() ? worker->async_view + shared_offset(p) : (const unsigned char*)p;
}

// --- mbarriers, in 8 bytes: expected arrivals, arrivals and bytes still missing, parity of the phase ---
struct Mbarrier {
  unsigned short count, missing;
  int bytes : 31;
  unsigned parity : 1;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is 8 bytes");

Mbarrier& state_of(unsigned long long* b) {
  expect_shared("an mbarrier", b, 8, 8);
  Mbarrier& m = *(Mbarrier*)b;
  if (strict() && (m.count == 0 || m.count > MAX_THREADS)) stop("an mbarrier that was not initialised");
  return m;
}

void settle(Mbarrier& m) {
  if (m.missing || m.bytes) return;
  m.missing = m.count;
  m.parity ^= 1;
}

void arrive(Mbarrier& m) {
  if (m.missing == 0) stop("more arrivals at an mbarrier than its phase expects");
  --m.missing;
}

// --- boxes ---
size_t box_bytes(const TensorMap& m) { return (size_t)m.box_rows * m.box_cols * m.element_bytes; }

// Calls f(byte offset in the box in shared memory, byte offset in global memory or -1 if outside, bytes).
template <class F>
void each_chunk(const TensorMap& m, int x, int y, F f) {
  const size_t e = m.element_bytes, row_bytes = m.box_cols * e;
  for (unsigned r = 0; r < m.box_rows; ++r)
    for (size_t at = 0; at < row_bytes; at += e) {
      const long long row = (long long)y + r, col = x + (long long)(at / e);
      const bool inside = row >= 0 && row < m.rows && col >= 0 && col < m.cols;
      const size_t chunk = m.swizzled ? (at / 16) ^ (r & 7) : at / 16;
      f(r * row_bytes + chunk * 16 + at % 16, inside ? (long long)(row * m.row_bytes + col * e) : -1, e);
    }
}

void expect_box(const char* what, const TensorMap& m, const void* p) {
  if (strict() && (m.element_bytes == 0 || m.box_cols * m.element_bytes % 16 || m.address % 16 || m.row_bytes % 16 ||
                   m.box_rows > 256 || (m.swizzled && m.box_cols * m.element_bytes != 128)))
    stop("a tensor map that no driver encodes: address and rows are multiples of 16 bytes, a swizzled box is 128 bytes wide");
  expect_shared(what, p, box_bytes(m), m.swizzled ? 1024 : 128);
}

void load_box(unsigned char* dst, const TensorMap& m, int x, int y) {
  each_chunk(m, x, y, [&](size_t to, long long from, size_t n) {
    if (from < 0)
      memset(dst + to, 0, n);
    else
      memcpy(dst + to, (const unsigned char*)m.address + from, n);
  });
  if (strict()) memcpy(worker->async_view + shared_offset(dst), dst, box_bytes(m));
}

void store_box(const Store& s) {
  const unsigned char* from = seen(s.src);
  each_chunk(*s.map, s.x, s.y, [&](size_t at, long long to, size_t n) {
    if (to >= 0) memcpy((unsigned char*)s.map->address + to, from + at, n);
  });
}

// Completes, in order, the copies and arrivals started for b.
void land(unsigned long long* b) {
  Worker& w = *worker;
  size_t kept = 0;
  for (size_t i = 0; i < w.bulk.size(); ++i) {
    Bulk& c = w.bulk[i];
    if (c.mbarrier != b) {
      if (kept != i) w.bulk[kept] = c;
      ++kept;
      continue;
    }
    Mbarrier& m = *(Mbarrier*)b;
    if (c.map) {
      load_box((unsigned char*)c.copy.dst, *c.map, c.x, c.y);
      m.bytes -= (int)box_bytes(*c.map);
    } else if (c.copy.dst) {
      memcpy(c.copy.dst, c.copy.src, c.copy.valid);
      memset((char*)c.copy.dst + c.copy.valid, 0, c.copy.bytes - c.copy.valid);
    } else {
      arrive(m);
    }
    settle(m);
  }
  w.bulk.resize(kept);
}

// A wait that would not block lands nothing: with the wrong parity a thread reads the previous contents.
bool mbarrier_passed(Fiber& f) {
  Mbarrier& m = *(Mbarrier*)f.mbarrier;
  if (m.parity == (unsigned)f.parity) land(f.mbarrier);
  return m.parity != (unsigned)f.parity;
}

// --- products ---

// Bytes from `tile` on that an operand of `rows` (m or n) spans.
size_t span(const WgmmaOperand& o, int rows) {
  return o.box ? (size_t)(rows - 1) / 64 * o.box + 16 * 128 : (size_t)rows * 128 - (size_t)shared_offset(o.tile) % 128;
}

bool overlap(const unsigned char* a, size_t an, const unsigned char* b, size_t bn) { return a < b + bn && b < a + an; }

// Strict: fails if a product in flight may read these bytes.
void expect_free(const char* what, const unsigned char* at, size_t bytes) {
  Worker& w = *worker;
  for (unsigned g = 0; g < w.threads / 128; ++g)
    for (const Wgmma& p : w.groups[g].pending) {
      const bool a = !p.from_registers && overlap(at, bytes, (const unsigned char*)p.a.tile, span(p.a, 64));
      const bool b = overlap(at, bytes, (const unsigned char*)p.b.tile, span(p.b, p.n));
      if (!a && !b) continue;
      char text[240];
      snprintf(text, sizeof text,
               "%s of thread %u into byte %lld of shared memory, which a wgmma of threads %u-%u may still read: wait for its "
               "group before the memory is given back",
               what, w.current, shared_offset(at), g * 128, g * 128 + 127);
      stop(text);
    }
}

void expect_operand(const char* what, const WgmmaOperand& o, int rows) {
  if (!strict()) return;
  expect_shared(what, o.tile, span(o, rows), 16);
  const long long in_group = shared_offset(o.tile) % 1024;
  if (o.box ? in_group != 0 : in_group % 32 || in_group >= 128) {
    char text[240];
    snprintf(text, sizeof text,
             "%s of thread %u at byte %lld of shared memory, which is not the start of 16 k in a tile of 128-byte rows with swizzle",
             what, worker->current, shared_offset(o.tile));
    stop(text);
  }
}

// One operand as floats, [rows][16].
void read_operand(float (*to)[16], const WgmmaOperand& o, int rows) {
  const long long in_group = shared_offset(o.tile) % 1024;
  const unsigned char* base = seen(o.tile) - in_group;
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < 16; ++k) {
      const long long row = o.box ? k : r, byte = o.box ? r % 64 * 2 : in_group + k * 2;
      const long long at = row * 128 + ((byte / 16 ^ (row & 7)) << 4) + byte % 16 + (o.box ? (long long)(r / 64) * o.box : 0);
      unsigned short bits;
      memcpy(&bits, base + at, 2);
      to[r][k] = as_float((unsigned)bits << 16);
    }
}

// The arithmetic of mma_bf16: sums the 16 products of a step from left to right, then adds the sum to d.
void multiply(const Wgmma& p) {
  static thread_local float a[64][16], b[256][16], bt[16][256];
  if (p.from_registers) {
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          a[t / 32 * 16 + t % 32 / 4 + (i & 1) * 8][t % 4 * 2 + (i >> 1) * 8 + h] =
              as_float((h ? p.registers[t][i] >> 16 : p.registers[t][i] & 0xffffu) << 16);
  } else {
    read_operand(a, p.a, 64);
  }
  read_operand(b, p.b, p.n);
  for (int c = 0; c < p.n; ++c)
    for (int k = 0; k < 16; ++k) bt[k][c] = b[c][k];
  for (int r = 0; r < 64; ++r) {
    float sum[256];
    for (int c = 0; c < p.n; ++c) sum[c] = 0.f;
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < p.n; ++c) sum[c] += a[r][k] * bt[k][c];
    const int warp = r / 16, g = r % 8, h = r % 16 / 8;
    for (int c = 0; c < p.n; ++c) {
      float& d = p.d[warp * 32 + g * 4 + c % 8 / 2][c / 8 * 4 + 2 * h + c % 2];
      d = (p.accumulate ? d : 0.f) + sum[c];
    }
  }
}

// For each product in flight that is the first on its accumulators: saves the accumulators and poisons them.
void keep_accumulators(Warpgroup& g) {
  for (size_t i = 0; i < g.pending.size(); ++i) {
    Wgmma& p = g.pending[i];
    bool first = !p.kept;
    for (size_t j = 0; j < i && first; ++j) first = g.pending[j].d[0] != p.d[0];
    if (!first) continue;
    p.kept = true;
    p.old.resize(128 * (size_t)p.n / 2);
    for (int t = 0; t < 128; ++t) {
      memcpy(&p.old[t * (size_t)p.n / 2], p.d[t], p.n / 2 * sizeof(float));
      for (int i = 0; i < p.n / 2; ++i) p.d[t][i] = as_float(0x7ff77ff7u);
    }
  }
}

void finish(Warpgroup& g, unsigned left) {
  size_t done = 0;
  for (; done < g.pending.size() && g.groups - g.pending[done].group > left; ++done) {
    Wgmma& p = g.pending[done];
    if (p.kept)
      for (int t = 0; t < 128; ++t) memcpy(p.d[t], &p.old[t * (size_t)p.n / 2], p.n / 2 * sizeof(float));
    multiply(p);
  }
  g.pending.erase(g.pending.begin(), g.pending.begin() + done);
  keep_accumulators(g);
}

void group_collective(const char* name, void* mine, WarpCompute compute) {
  Worker& w = *worker;
  const unsigned i = w.current / 128;
  collective(name, mine, compute, 128, w.group_arrived[i], w.group_collective[i]);
}

Warpgroup& this_group() { return worker->groups[worker->current / 128]; }

struct WgmmaLane {
  int n;
  bool trans_a, trans_b, accumulate;
  float* d;
  const unsigned* registers;
  WgmmaOperand a, b;
};

void wgmma_of_group(void* const* lanes) {
  const WgmmaLane& l = *(const WgmmaLane*)lanes[0];
  Wgmma p;
  p.n = l.n;
  p.trans_a = l.trans_a;
  p.trans_b = l.trans_b;
  p.accumulate = l.accumulate;
  p.from_registers = l.registers != nullptr;
  p.kept = false;
  p.a = l.a;
  p.b = l.b;
  p.group = this_group().groups;
  for (int t = 0; t < 128; ++t) {
    const WgmmaLane& o = *(const WgmmaLane*)lanes[t];
    if (o.b.tile != l.b.tile || o.a.tile != l.a.tile || o.accumulate != l.accumulate)
      return fail("the threads of a warpgroup give one wgmma different operands");
    p.d[t] = o.d;
    if (p.from_registers) memcpy(p.registers[t], o.registers, 16);
  }
  if (p.trans_a != (p.a.box != 0) && !p.from_registers) return fail("wgmma: the descriptor of A does not fit its TRANS");
  if (p.trans_b != (p.b.box != 0)) return fail("wgmma: the descriptor of B does not fit its TRANS");
  if (!strict()) return multiply(p);
  if (!this_group().fenced) return fail("a wgmma without a wgmma_fence since the last wait");
  this_group().pending.push_back(p);
  keep_accumulators(this_group());
}

void check_nothing_in_flight() {
  Worker& w = *worker;
  char text[160] = "";
  if (!w.bulk.empty())
    snprintf(text, sizeof text, "the block ended with %zu bulk copies whose mbarrier nobody waited for", w.bulk.size());
  else if (!w.stores.empty())
    snprintf(text, sizeof text, "thread %u ended with %zu stores by tensor map that it never waited for", w.stores[0].thread,
             w.stores.size());
  else
    for (unsigned g = 0; g < MAX_THREADS / 128; ++g)
      if (!w.groups[g].pending.empty())
        snprintf(text, sizeof text, "threads %u-%u ended with %zu wgmma that they never waited for", g * 128, g * 128 + 127,
                 w.groups[g].pending.size());
  if (*text) fail(text);
}

}  // namespace

void mbarrier_init(unsigned long long* b, int arrivals) {
  expect_shared("an mbarrier", b, 8, 8);
  Mbarrier& m = *(Mbarrier*)b;
  m.count = m.missing = (unsigned short)arrivals;
  m.bytes = 0;
  m.parity = 0;
}

void mbarrier_arrive(unsigned long long* b, int bytes) {
  Mbarrier& m = state_of(b);
  arrive(m);
  m.bytes += bytes;
  settle(m);
}

void mbarrier_arrive_copies(unsigned long long* b) {
  state_of(b);
  Worker& w = *worker;
  Fiber& f = w.fibers[w.current];
  for (unsigned i = 0; i < f.copies; ++i) w.bulk.push_back({b, nullptr, 0, 0, f.pending[i]});
  f.copies = 0;
  w.bulk.push_back({b, nullptr, 0, 0, {}});
  if (!strict()) land(b);
}

void mbarrier_wait(unsigned long long* b, int parity) {
  state_of(b);
  Fiber& f = worker->fibers[worker->current];
  f.mbarrier = b;
  f.parity = parity;
  if (!mbarrier_passed(f)) to_scheduler(AT_MBARRIER);
}

void bulk_load(void* dst, const TensorMap* map, unsigned long long* b, int x, int y) {
  state_of(b);
  expect_box("a load by tensor map", *map, dst);
  if (strict()) {
    expect_free("a load by tensor map", (unsigned char*)dst, box_bytes(*map));
    unsigned short* to = (unsigned short*)dst;
    for (size_t i = 0; i < box_bytes(*map) / 2; ++i) to[i] = POISON;
    memcpy(worker->async_view + shared_offset(dst), dst, box_bytes(*map));
  }
  worker->bulk.push_back({b, map, x, y, {dst, nullptr, 0, 0, 0}});
  if (!strict()) land(b);
}

void bulk_store(const TensorMap* map, const void* src, int x, int y) {
  Worker& w = *worker;
  expect_box("a store by tensor map", *map, src);
  const Store s = {map, src, x, y, w.current, w.store_groups[w.current]};
  if (strict())
    w.stores.push_back(s);
  else
    store_box(s);
}

void tma_commit() { ++worker->store_groups[worker->current]; }

void tma_wait(int left) {
  Worker& w = *worker;
  size_t kept = 0;
  for (size_t i = 0; i < w.stores.size(); ++i) {
    const Store s = w.stores[i];
    if (s.thread == w.current && (int)(w.store_groups[w.current] - s.group) > left)
      store_box(s);
    else
      w.stores[kept++] = s;
  }
  w.stores.resize(kept);
}

void fence_async_proxy() {
  Worker& w = *worker;
  if (strict()) memcpy(w.async_view, w.shared, w.launch->shared_bytes);
}

void named_barrier(int id, int threads, bool wait) {
  Worker& w = *worker;
  if (id < 1 || id > 15 || threads % 32 || (unsigned)threads > w.threads) stop("a named barrier that does not exist: id 1 to 15, a multiple of 32 threads");
  if (++w.named[id] < (unsigned)threads) {
    w.fibers[w.current].named = id;
    if (wait) to_scheduler(AT_NAMED);
    return;
  }
  w.named[id] = 0;
  for (unsigned t = 0; t < w.threads; ++t)
    if (w.fibers[t].state == AT_NAMED && w.fibers[t].named == id) w.fibers[t].state = READY;
}

void wgmma_fence() {
  group_collective("wgmma_fence", nullptr, [](void* const*) { this_group().fenced = true; });
}

void wgmma_commit() {
  group_collective("wgmma_commit", nullptr, [](void* const*) { ++this_group().groups; });
}

void wgmma_wait(int left) {
  group_collective("wgmma_wait", &left, [](void* const* lanes) {
    finish(this_group(), (unsigned)*(const int*)lanes[0]);
    this_group().fenced = false;
  });
}

void wgmma(int n, bool trans_a, bool trans_b, float* d, const unsigned* registers, WgmmaOperand a, WgmmaOperand b, bool accumulate) {
  if (!registers) expect_operand("operand A of a wgmma", a, 64);
  expect_operand("operand B of a wgmma", b, n);
  WgmmaLane l = {n, trans_a, trans_b, accumulate, d, registers, a, b};
  group_collective("wgmma", &l, wgmma_of_group);
}

}  // namespace shim
