// The fiber runtime behind shim.h: one Worker per OS thread, which holds the stacks, the shared memory and the state of the
// running block. See shim.h for its guarantees.
#include "shim/shim.h"

#include <cstdio>
#include <cstdlib>
#include <sched.h>
#include <sys/mman.h>
#include <vector>

__thread shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- switching stacks: saves and restores only the callee-saved registers ---
extern "C" void temper_shim_switch(void** save_sp, void* load_sp) asm("temper_shim_switch");
#if defined(__x86_64__)
asm(R"(
.text
.globl temper_shim_switch
temper_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static const int SAVED_WORDS = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl temper_shim_switch
.p2align 2
temper_shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the shim switches stacks on x86-64 and aarch64 only"
#endif

namespace shim {
namespace {

const unsigned MAX_THREADS = 1024;
const size_t STACK_BYTES = 128 << 10;
const size_t GUARD_BYTES = 16 << 10;
const size_t RED_ZONE = 256;
const unsigned MAX_COPIES = 64;
const unsigned short POISON = 0x7ff7;  // NaN as a bf16; two of them are a NaN as a float

enum State : unsigned char { READY, AT_BARRIER, AT_COLLECTIVE, AT_MBARRIER, AT_NAMED, DONE };

struct Copy {
  void* dst;
  const void* src;
  unsigned bytes, valid, group;
};

struct Fiber {
  void* sp;
  State state;
  const char* at;  // name of the collective where it waits
  void* data;
  unsigned groups, copies;  // async copy groups committed; async copies pending
  Copy pending[MAX_COPIES];
  unsigned long long* mbarrier;  // the mbarrier and the parity that it waits for
  int parity, named;             // named: the named barrier where it waits
};

// A copy that lands when a thread waits for its mbarrier: a box of a map, a cp.async of this thread, or the arrival after its
// cp.async (dst null).
struct Bulk {
  unsigned long long* mbarrier;
  const TensorMap* map;
  int x, y;
  Copy copy;
};

// A box in flight to global memory.
struct Store {
  const TensorMap* map;
  const void* src;
  int x, y;
  unsigned thread, group;
};

// A product in flight, in strict mode.
struct Wgmma {
  int n;
  bool trans_a, trans_b, from_registers, accumulate, kept;
  WgmmaOperand a, b;
  unsigned registers[128][4];
  float* d[128];
  unsigned group;
  std::vector<float> old;  // the accumulators before it, 128 times n/2, if `kept`; until it is done they hold poison
};

struct Warpgroup {
  std::vector<Wgmma> pending;
  unsigned groups = 0;
  bool fenced = false;
};

struct Worker {
  char* stacks = nullptr;
  Fiber* fibers = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_cap = 0;
  void* scheduler = nullptr;
  const Launch* launch = nullptr;
  Body body = nullptr;
  void* arg = nullptr;
  unsigned threads = 0, current = 0, at_barrier = 0, done = 0;
  unsigned arrived[MAX_THREADS / 32];           // lanes of each warp that wait in its collective
  const char* collective[MAX_THREADS / 32];     // the name of that collective
  unsigned group_arrived[MAX_THREADS / 128];    // the same for warpgroups
  const char* group_collective[MAX_THREADS / 128];
  unsigned named[16];                           // arrivals at each named barrier
  unsigned char* async_view = nullptr;          // strict: shared memory as TMA stores and wgmma see it
  std::vector<Bulk> bulk;
  std::vector<Store> stores;
  unsigned store_groups[MAX_THREADS];
  Warpgroup groups[MAX_THREADS / 128];
  bool failed = false;

  ~Worker();
};

__thread Worker* worker;

// Frees a worker when its thread ends. The stacks are thousands of mappings, and a process may have only 65,530: a program that
// opens many devices, as the tests do, ran out of them.
thread_local struct WorkerOwner {
  ~WorkerOwner() {
    delete worker;
    worker = nullptr;
  }
  void touch() {}  // the first use constructs it, so that it is destroyed when the thread ends
} owner;

void fail(const char* text) {
  Worker& w = *worker;
  if (!w.failed) snprintf(w.launch->error, w.launch->error_bytes, "block (%u,%u,%u): %s", blockIdx.x, blockIdx.y, blockIdx.z, text);
  w.failed = true;
}

void to_scheduler(State s) {
  Worker& w = *worker;
  Fiber& f = w.fibers[w.current];
  f.state = s;
  temper_shim_switch(&f.sp, w.scheduler);
}

bool mbarrier_passed(Fiber& f);
void check_nothing_in_flight();
void expect_free(const char* what, const unsigned char* at, size_t bytes);

// The first frame of every fiber. A fiber that has ended is never switched to again.
void fiber_main() {
  Worker& w = *worker;
  w.body(w.arg);
  Fiber& f = w.fibers[w.current];
  if (f.copies && w.launch->strict) {
    char text[120];
    snprintf(text, sizeof text, "thread %u ended with %u async copies that it never waited for", w.current, f.copies);
    fail(text);
  }
  to_scheduler(DONE);
}

void prepare(Fiber& f, char* stack) {
  void** top = (void**)(stack + STACK_BYTES) - 2;  // 16-byte aligned
#if defined(__x86_64__)
  *--top = nullptr;  // the return address of fiber_main: gives the stack alignment that the ABI requires at its entry
  *--top = (void*)fiber_main;
  top -= SAVED_WORDS;
  memset(top, 0, SAVED_WORDS * sizeof(void*));
#else
  top -= 20;
  memset(top, 0, 20 * sizeof(void*));
  top[11] = (void*)fiber_main;  // x30
#endif
  f.sp = top;
  f.state = READY;
  f.at = nullptr;
  f.groups = f.copies = 0;
}

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void permutation(unsigned* order, unsigned n, uint64_t seed, bool shuffle) {
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  if (!shuffle) return;
  for (unsigned i = n; i > 1; --i) {
    unsigned j = mix(seed + i) % i, t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

void set_thread(const Launch& l, unsigned t) {
  threadIdx = {t % l.block[0], t / l.block[0] % l.block[1], t / l.block[0] / l.block[1]};
}

// Lists which threads wait where, for a block that cannot make progress.
void report_deadlock() {
  Worker& w = *worker;
  unsigned collective = 0, ended = 0;
  for (unsigned t = 0; t < w.threads; ++t) {
    collective += w.fibers[t].state == AT_COLLECTIVE;
    ended += w.fibers[t].state == DONE;
  }
  const char* kind = w.at_barrier + ended == w.threads   ? "a block barrier that some threads skip:"
                     : collective + ended == w.threads ? "a warp collective that some lanes skip:"
                                                       : "deadlock:";
  char text[768];
  int n = snprintf(text, sizeof text, "%s", kind);
  for (unsigned t = 0; t < w.threads;) {
    Fiber& f = w.fibers[t];
    unsigned e = t + 1;
    while (e < w.threads && w.fibers[e].state == f.state && (f.state != AT_COLLECTIVE || w.fibers[e].at == f.at) &&
           (f.state != AT_MBARRIER || (w.fibers[e].mbarrier == f.mbarrier && w.fibers[e].parity == f.parity)))
      ++e;
    if (n > 640) {
      snprintf(text + n, sizeof text - n, " and so on");
      break;
    }
    const char* what = f.state == DONE          ? "ended"
                       : f.state == AT_BARRIER  ? "at a block barrier"
                       : f.state == AT_NAMED    ? "at a named barrier"
                       : f.state == AT_MBARRIER ? "at an mbarrier"
                                                : f.at;
    if (e - t == 1)
      n += snprintf(text + n, sizeof text - n, "%s thread %u %s", t ? "," : "", t, f.state == AT_COLLECTIVE ? "in " : "");
    else
      n += snprintf(text + n, sizeof text - n, "%s threads %u-%u %s", t ? "," : "", t, e - 1, f.state == AT_COLLECTIVE ? "in " : "");
    n += snprintf(text + n, sizeof text - n, "%s", what);
    if (f.state == AT_MBARRIER)
      n += snprintf(text + n, sizeof text - n, " (byte %lld, parity %d)", (long long)((unsigned char*)f.mbarrier - w.shared), f.parity);
    t = e;
  }
  fail(text);
}

void run_block(const Launch& l, uint64_t block) {
  Worker& w = *worker;
  w.at_barrier = w.done = 0;
  memset(w.arrived, 0, sizeof w.arrived);
  memset(w.group_arrived, 0, sizeof w.group_arrived);
  memset(w.named, 0, sizeof w.named);
  memset(w.store_groups, 0, sizeof w.store_groups);
  w.bulk.clear();
  w.stores.clear();
  for (Warpgroup& g : w.groups) g = Warpgroup();
  for (unsigned t = 0; t < w.threads; ++t) prepare(w.fibers[t], w.stacks + t * (STACK_BYTES + GUARD_BYTES) + GUARD_BYTES);
  if (l.strict) {
    unsigned short* s = (unsigned short*)w.shared;
    for (size_t i = 0; i < (l.shared_bytes + RED_ZONE) / 2; ++i) s[i] = POISON;
    memcpy(w.async_view, w.shared, l.shared_bytes);
  }
  unsigned order[MAX_THREADS];
  permutation(order, w.threads, l.seed + block * 7919, l.strict);
  while (w.done < w.threads && !w.failed) {
    bool progress = false;
    for (unsigned i = 0; i < w.threads && !w.failed; ++i) {
      Fiber& f = w.fibers[order[i]];
      if (f.state == AT_MBARRIER && mbarrier_passed(f)) f.state = READY;
      if (f.state != READY) continue;
      progress = true;
      w.current = order[i];
      set_thread(l, order[i]);
      temper_shim_switch(&w.scheduler, f.sp);
      if (f.state == DONE) ++w.done;
    }
    if (!progress && !w.failed && w.done < w.threads) report_deadlock();
  }
  if (l.strict && !w.failed) check_nothing_in_flight();
  if (l.strict && !w.failed)
    for (size_t i = l.shared_bytes / 2; i < (l.shared_bytes + RED_ZONE) / 2; ++i)
      if (((unsigned short*)w.shared)[i] != POISON) {
        fail("a write past the end of shared memory; is the launch's shared size too small?");
        break;
      }
}

Worker::~Worker() {
  if (stacks) munmap(stacks, MAX_THREADS * (STACK_BYTES + GUARD_BYTES));
  delete[] fibers;
  free(shared);
  free(async_view);
}

Worker& this_worker(const Launch& l) {
  owner.touch();
  if (!worker) worker = new Worker();
  Worker& w = *worker;
  if (!w.stacks) {
    size_t each = STACK_BYTES + GUARD_BYTES;
    w.stacks = (char*)mmap(nullptr, MAX_THREADS * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w.stacks == (char*)MAP_FAILED) abort();
    for (unsigned i = 0; i < MAX_THREADS; ++i) mprotect(w.stacks + i * each, GUARD_BYTES, PROT_NONE);
    w.fibers = new Fiber[MAX_THREADS];
  }
  if (w.shared_cap < l.shared_bytes + RED_ZONE) {
    free(w.shared);
    free(w.async_view);
    w.shared_cap = (l.shared_bytes + RED_ZONE + 1023) / 1024 * 1024;
    w.shared = (unsigned char*)aligned_alloc(1024, w.shared_cap);
    w.async_view = (unsigned char*)aligned_alloc(1024, w.shared_cap);
  }
  w.launch = &l;
  w.failed = false;
  gridDim = {l.grid[0], l.grid[1], l.grid[2]};
  blockDim = {l.block[0], l.block[1], l.block[2]};
  return w;
}

void set_block_index(const Launch& l, uint64_t b) {
  FlatThread t;
  set_block(t, l, b);
  blockIdx = t.blockIdx;
}

}  // namespace

void run_fibers(const Launch& l, Body body, void* arg) {
  Worker& w = this_worker(l);
  w.body = body;
  w.arg = arg;
  w.threads = l.block[0] * l.block[1] * l.block[2];
  for (uint64_t b = l.block_begin; b < l.block_end && !w.failed; ++b) {
    set_block_index(l, b);
    run_block(l, b);
  }
}

void run_permuted(const Launch& l, Body body, void* arg) {
  this_worker(l);
  unsigned n = l.block[0] * l.block[1] * l.block[2], order[MAX_THREADS];
  for (uint64_t b = l.block_begin; b < l.block_end; ++b) {
    set_block_index(l, b);
    permutation(order, n, l.seed + b * 7919, true);
    for (unsigned i = 0; i < n; ++i) {
      set_thread(l, order[i]);
      body(arg);
    }
  }
}

void block_barrier() {
  Worker& w = *worker;
  if (++w.at_barrier < w.threads) {
    to_scheduler(AT_BARRIER);
    return;
  }
  w.at_barrier = 0;
  for (unsigned t = 0; t < w.threads; ++t)
    if (w.fibers[t].state == AT_BARRIER) w.fibers[t].state = READY;
}

int lane_id() { return (int)(worker->current % 32); }

namespace {
// A collective of the aligned `size` threads around this one. `arrived` and `current` are its counter and its name.
void collective(const char* name, void* mine, WarpCompute compute, unsigned size, unsigned& arrived, const char*& current) {
  Worker& w = *worker;
  const unsigned first = w.current / size * size;
  const char* kind = size == 32 ? "warp" : "warpgroup";
  Fiber& me = w.fibers[w.current];
  me.data = mine;
  me.at = name;
  char text[200];
  if (w.threads - first < size) {
    snprintf(text, sizeof text, "a %s collective in a block whose size is not a multiple of %u", kind, size);
    fail(text);
    to_scheduler(AT_COLLECTIVE);
  }
  if (arrived == 0) current = name;
  if (current != name && strcmp(current, name) != 0) {
    snprintf(text, sizeof text, "divergent collectives in %s %u (threads %u-%u): thread %u is in %s, others are in %s", kind,
             first / size, first, first + size - 1, w.current, name, current);
    fail(text);
    to_scheduler(AT_COLLECTIVE);
  }
  if (++arrived < size) {
    to_scheduler(AT_COLLECTIVE);
    return;
  }
  arrived = 0;
  void* data[128];
  for (unsigned i = 0; i < size; ++i) data[i] = w.fibers[first + i].data;
  compute(data);
  if (w.failed) to_scheduler(AT_COLLECTIVE);
  for (unsigned t = first; t < first + size; ++t)
    if (w.fibers[t].state == AT_COLLECTIVE) w.fibers[t].state = READY;
}
}  // namespace

void warp_collective(const char* name, void* mine, WarpCompute compute) {
  Worker& w = *worker;
  const unsigned i = w.current / 32;
  collective(name, mine, compute, 32, w.arrived[i], w.collective[i]);
}

void shuffle(ShuffleLane* mine) {
  warp_collective("a shuffle", mine, [](void* const* lanes) {
    unsigned long long in[32];
    for (int i = 0; i < 32; ++i) in[i] = ((ShuffleLane*)lanes[i])->value;
    for (int i = 0; i < 32; ++i) ((ShuffleLane*)lanes[i])->value = in[((ShuffleLane*)lanes[i])->source];
  });
}

void warp_sync() {
  warp_collective("a warp sync", nullptr, [](void* const*) {});
}

void yield_thread() { sched_yield(); }

unsigned char* shared_memory() { return worker->shared; }

void expect_shared16(const char* what, const void* p) {
  Worker& w = *worker;
  if (!w.launch->strict) return;
  const unsigned char* at = (const unsigned char*)p;
  const bool inside = at >= w.shared && at + 16 <= w.shared + w.launch->shared_bytes;
  if (inside && (size_t)p % 16 == 0) return;
  char text[200];
  snprintf(text, sizeof text, "%s of thread %u at byte %lld of shared memory (the launch has %u): %s", what, w.current,
           (long long)(at - w.shared), w.launch->shared_bytes, inside ? "not a multiple of 16" : "outside");
  fail(text);
  to_scheduler(AT_BARRIER);
}

void async_copy(void* dst, const void* src, unsigned bytes, unsigned valid) {
  Fiber& f = worker->fibers[worker->current];
  expect_shared16("an async copy", dst);
  if (worker->launch->strict && (size_t)src % 16) {
    char text[120];
    snprintf(text, sizeof text, "an async copy of thread %u from an address that is not a multiple of 16", worker->current);
    fail(text);
    to_scheduler(AT_BARRIER);
  }
  if (worker->launch->strict) expect_free("an async copy", (const unsigned char*)dst, bytes);
  if (f.copies == MAX_COPIES) {
    fail("more than 64 async copies pending in one thread");
    to_scheduler(AT_BARRIER);
  }
  f.pending[f.copies++] = {dst, src, bytes, valid, f.groups};
}

void async_commit() { ++worker->fibers[worker->current].groups; }

void async_wait(int left) {
  Fiber& f = worker->fibers[worker->current];
  unsigned kept = 0;
  for (unsigned i = 0; i < f.copies; ++i) {
    Copy& c = f.pending[i];
    if ((int)(f.groups - c.group) > left) {
      memcpy(c.dst, c.src, c.valid);
      memset((char*)c.dst + c.valid, 0, c.bytes - c.valid);
    } else {
      f.pending[kept++] = c;
    }
  }
  f.copies = kept;
}

}  // namespace shim

#include "shim/hopper.h"
