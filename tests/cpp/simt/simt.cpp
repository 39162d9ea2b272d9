// SPDX-License-Identifier: Apache-2.0
// Scheduler, barriers, warp collectives, the shared-memory arena, cp.async. Compiled without
// sanitizers: all fibers share its data on purpose.
#include "simt/simt.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "simt/fiber.h"

namespace simt {

ThreadView* current;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kRedzone = 64, kArenaBytes = 512 * 1024, kSmemAlign = 128;

struct Random {
  uint64_t state = 1;
  uint64_t next() {  // xorshift64*
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
  }
  unsigned below(unsigned n) { return unsigned((next() >> 32) * n >> 32); }
};

struct Copy {
  uint32_t shared;
  const void* global;
  unsigned bytes;
  bool valid;
};

// Two ThreadSanitizer objects used in turn: the next phase's releases must not leak into this one's
// acquires.
struct SyncPair {
  char object[2] = {};
  unsigned phase = 0;
  void* now() { return &object[phase & 1]; }
};

struct Warp;
struct Block;
struct Thread : ThreadView {
  Fiber fiber;
  Block* owner = nullptr;
  Warp* warp_state = nullptr;
  bool done = true;
  const char* waits_in = nullptr;  // null: ready
  Site site;
  Operands operands{};
  std::vector<Copy> open_group;               // cp.async issued, not committed
  std::deque<std::vector<Copy>> groups;       // committed, oldest first
  std::map<uint64_t, unsigned> access_count;  // of each site, for the counters
};
struct Meeting {  // a warp collective some lanes have reached
  uint32_t mask, arrived;
  WarpFunction fn;
  const char* name;
  Site site;
};
struct Request {
  std::set<uintptr_t> sectors;
  unsigned bytes = 0;
  std::array<std::vector<uint32_t>, 4>
      quarter;  // shared addresses of 8 lanes each, served together
};
struct Warp {
  uint32_t ready = 0, alive = 0;
  uint64_t priority = 0;
  Thread* lane[32] = {};
  std::vector<Meeting> meetings;
  SyncPair sync[32];  // of the meeting whose lowest lane is i
  std::map<std::pair<uint64_t, unsigned>, Request> gmem, smem;
};
struct Barrier {
  unsigned arrived = 0, expected = 0;
  Site first;
  SyncPair sync;
  std::vector<Thread*> waiting;
};
struct Block {
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  std::array<Barrier, 16> barriers;
  unsigned live = 0;
  uint8_t* arena = nullptr;
  size_t smem_bytes = 0;
  bool running = false;
};
struct Translation {
  TranslatedKernel kernel;
  size_t param_bytes;
};
struct Job {  // the launch under way
  const void *kernel, *params;
  void (*call)(const void*, const void*);
  TranslatedKernel translated;
};

Random rng;
Job job;
Fiber host;         // the code that called launch()
std::string fault;  // set by fail()
Block* finished;    // set when a block's last thread ends
Warp* running_warp;
char launch_sync, done_sync;
uint64_t progress, polled_at;  // events a polling loop may be waiting for

// Never destroyed: fibers may be abandoned in mid-kernel, even at exit.
using Blocks = std::vector<std::unique_ptr<Block>>;
auto& blocks = *new Blocks;
auto& resting = *new std::map<std::array<unsigned, 3>, Blocks>;  // by their dimensions
auto& pollers = *new std::vector<Thread*>;
std::map<std::string, Translation>& translations() {
  static auto& all = *new std::map<std::string, Translation>;
  return all;
}

Thread* self() { return static_cast<Thread*>(current); }

std::string text(Site site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}
bool same_line(Site a, Site b) {
  return a.line() == b.line() && !strcmp(a.file_name(), b.file_name());
}
uint64_t key(Site site) {
  uint64_t hash = site.line() * 0x9E3779B97F4A7C15ull;
  for (const char* c = site.file_name(); *c; ++c) hash = (hash ^ uint8_t(*c)) * 0x100000001B3ull;
  return hash;
}

// --- scheduling --------------------------------------------------------------------------------

Warp* pick_warp() {
  Warp* best = nullptr;
  unsigned seen = 0;
  for (auto& block : blocks) {
    for (auto& warp : block->warps) {
      if (!warp.ready) continue;
      switch (options().schedule) {
        case Schedule::kInOrder:
          return &warp;
        case Schedule::kRandom:
          if (rng.below(++seen) == 0) best = &warp;
          break;
        case Schedule::kPct:
          if (!best || warp.priority > best->priority) best = &warp;
          break;
      }
    }
  }
  return best;
}
Thread* pick_thread() {
  if (options().schedule == Schedule::kRandom || !running_warp || !running_warp->ready)
    running_warp = pick_warp();
  if (!running_warp) return nullptr;
  const uint32_t ready = running_warp->ready;
  if (options().schedule == Schedule::kInOrder) return running_warp->lane[__builtin_ctz(ready)];
  const unsigned start = rng.below(32);
  const uint32_t rotated = ready >> start | (start ? ready << (32 - start) : 0);
  return running_warp->lane[(__builtin_ctz(rotated) + start) & 31];
}
void wake(Thread* thread) {
  thread->waits_in = nullptr;
  thread->warp_state->ready |= 1u << thread->lane;
}
Thread* next_thread() {
  for (;;) {
    if (Thread* thread = pick_thread()) return thread;
    if (pollers.empty() || progress == polled_at) return nullptr;  // all wait, for what cannot come
    polled_at = progress;
    for (Thread* thread : pollers) wake(thread);
    pollers.clear();
  }
}
void enter(Fiber& from, Thread* to) {
  current = to;
  ++counters().switches;
  switch_fiber(from, to->fiber);
}
void reschedule() {  // returns when this thread is picked again
  Thread* me = self();
  Thread* next = finished ? nullptr : next_thread();
  if (next == me) return;
  if (next) {
    enter(me->fiber, next);
  } else {
    switch_fiber(me->fiber, host);
  }
}
void wait(const char* what, Site site) {
  Thread* me = self();
  me->waits_in = what;
  me->site = site;
  me->warp_state->ready &= ~(1u << me->lane);
  reschedule();
}
void release(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
  barrier.arrived = 0;
  ++barrier.sync.phase;
  ++counters().barriers;
  ++progress;
  if (options().schedule == Schedule::kPct) {  // now and then another warp runs ahead
    for (auto& block : blocks) {
      for (auto& warp : block->warps) {
        if (rng.below(2)) warp.priority = rng.next();
      }
    }
    running_warp = nullptr;
  }
}
void end_thread() {
  Thread* me = self();
  Block* block = me->owner;
  cp_async_commit();
  cp_async_wait(0);
  me->done = true;
  ++progress;
  me->warp_state->ready &= ~(1u << me->lane);
  me->warp_state->alive &= ~(1u << me->lane);
  for (auto& meeting : me->warp_state->meetings) {
    if (meeting.mask >> me->lane & 1) {
      fail("thread %u exits while its warp waits for it in %s (%s)", me->linear, meeting.name,
           text(meeting.site).c_str());
    }
  }
  if (--block->live == 0) {
    finished = block;
  } else if (block->barriers[0].arrived) {
    fail("thread %u exits while %u others wait at __syncthreads (%s)", me->linear,
         block->barriers[0].arrived, text(block->barriers[0].first).c_str());
  }
}
void thread_main() {
  entered(self()->fiber);
  for (;;) {  // one turn a block: the fiber is used again
    sync_acquire(&launch_sync);
    if (job.translated) {
      smem_open_all();
      job.translated(static_cast<const uint8_t*>(job.params));
    } else {
      job.call(job.kernel, job.params);
    }
    sync_release(&done_sync);
    end_thread();
    reschedule();
  }
}
std::string describe_deadlock() {
  std::map<std::string, std::vector<std::string>> waiting;
  for (auto& block : blocks) {
    if (!block->running) continue;
    for (auto& thread : block->threads) {
      if (thread->done) continue;
      const std::string where =
          blocks.size() > 1 ? "b" + std::to_string(thread->block.x) + "/" : "";
      waiting[std::string(thread->waits_in ? thread->waits_in : "nothing") + " at " +
              text(thread->site)]
          .push_back(where + std::to_string(thread->linear));
    }
  }
  std::string s = "deadlock:";
  for (auto& [place, threads] : waiting) {
    s += "\n  " + std::to_string(threads.size()) + " threads wait in " + place + " (";
    for (size_t i = 0; i < threads.size() && i < 8; ++i) s += (i ? " " : "") + threads[i];
    s += threads.size() > 8 ? " ...)" : ")";
  }
  return s;
}

// --- blocks ------------------------------------------------------------------------------------

void drop_blocks() {
  Quiet quiet;
  for (auto& block : blocks) {
    for (auto& thread : block->threads) thread->fiber.destroy();
    if (block->arena) {
      unpoison(block->arena, kArenaBytes);
      unmap_pages(block->arena, kArenaBytes);
    }
  }
  blocks.clear();
  pollers.clear();
}
// Fibers are dear under ThreadSanitizer, and few: a few thousand of them are kept for launches of
// the same dimensions.
void change_dimensions(dim3 block) {
  constexpr size_t kMostThreads = 4096;
  size_t threads = 0;
  {
    Quiet quiet;
    resting[{block_dim.x, block_dim.y, block_dim.z}] = std::move(blocks);
    blocks.clear();
    for (auto& [dimensions, group] : resting) {
      for (auto& b : group) threads += b->threads.size();
    }
  }
  if (threads > kMostThreads) {
    for (auto& [dimensions, group] : resting) {
      Quiet quiet;
      blocks = std::move(group);
      drop_blocks();
    }
    resting.clear();
  }
  Quiet quiet;
  blocks = std::move(resting[{block.x, block.y, block.z}]);
  block_dim = block;
}
void make_block(unsigned threads) {
  auto block = std::make_unique<Block>();
  block->warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < threads; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->fiber.create(thread_main);
    thread->owner = block.get();
    thread->warp_state = &block->warps[i / 32];
    thread->warp_state->lane[i % 32] = thread.get();
    thread->linear = i;
    thread->lane = i % 32;
    thread->warp = i / 32;
    thread->thread =
        dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y));
    block->threads.push_back(std::move(thread));
  }
  blocks.push_back(std::move(block));
}
void start_block(Block& block, uint64_t index, size_t smem_bytes) {
  Quiet quiet;
  // Under TSan fresh pages, so that the last block's accesses are forgotten.
  if (block.arena && under_tsan()) {
    unmap_pages(block.arena, kArenaBytes);
    block.arena = nullptr;
  }
  if (!block.arena) block.arena = static_cast<uint8_t*>(map_pages(kArenaBytes));
  unpoison(block.arena, kArenaBytes);
  memset(block.arena, 0xFF,
         std::min(kArenaBytes, smem_bytes * 2 + 4096));  // NaN in every float format
  poison(block.arena, kArenaBytes);
  block.smem_bytes = smem_bytes;
  block.live = unsigned(block.threads.size());
  block.running = true;
  ++progress;
  for (auto& barrier : block.barriers) {
    barrier.arrived = barrier.expected = 0;
    barrier.waiting.clear();
    barrier.waiting.reserve(block.threads.size());
  }
  for (auto& warp : block.warps) {
    warp.priority = rng.next();
    warp.ready = warp.alive = 0;
    warp.meetings.clear();
    warp.meetings.reserve(32);
    warp.gmem.clear();
    warp.smem.clear();
  }
  for (auto& thread : block.threads) {
    thread->block = dim3(index % grid_dim.x, index / grid_dim.x % grid_dim.y,
                         unsigned(index / grid_dim.x / grid_dim.y));
    thread->done = false;
    thread->open_group.clear();
    thread->groups.clear();
    thread->access_count.clear();
    thread->warp_state->alive |= 1u << thread->lane;
    wake(thread.get());
  }
}
void finish_block(Block& block) {
  Quiet quiet;
  block.running = false;
  Counters& c = counters();
  for (auto& warp : block.warps) {
    for (auto& [where, request] : warp.gmem) {
      ++c.gmem_requests;
      c.gmem_sectors += request.sectors.size();
      c.gmem_ideal_sectors += (request.bytes + 31) / 32;
    }
    for (auto& [where, request] : warp.smem) {
      ++c.smem_requests;
      for (auto& addresses :
           request.quarter) {  // each quarter warp moves 8 x 16 bytes: all 32 banks once
        std::set<uint32_t> rows(addresses.begin(), addresses.end());
        unsigned passes[8] = {}, worst = 0;
        for (uint32_t address : rows) worst = std::max(worst, ++passes[address / 16 % 8]);
        if (worst > 1) c.smem_conflicts += worst - 1;
      }
    }
  }
}
void check_limits(const char* name, dim3 grid, dim3 block, size_t smem_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  char buffer[512] = "";
  const auto say = [&](auto... arguments) { snprintf(buffer, sizeof buffer, arguments...); };
  if (threads == 0 || threads > 1024 || block.z > 64) {
    say("%s: block of %u x %u x %u threads", name, block.x, block.y, block.z);
  } else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 ||
             grid.z > 65535) {
    say("%s: grid of %u x %u x %u blocks", name, grid.x, grid.y, grid.z);
  } else if (smem_bytes > options().max_dynamic_smem) {
    say("%s: %zu bytes of dynamic shared memory, at most %zu", name, smem_bytes,
        options().max_dynamic_smem);
  }
  if (*buffer) throw Error(buffer);
}

}  // namespace

// --- launching ---------------------------------------------------------------------------------

Options& options() {
  static Options all = [] {
    const auto variable = [](const char* name) {
      const char* value = getenv(name);
      return std::string(value ? value : "");
    };
    Options o;
    const std::string schedule = variable("SIMT_SCHED"), landing = variable("SIMT_ASYNC");
    if (schedule == "random") o.schedule = Schedule::kRandom;
    if (schedule == "pct") o.schedule = Schedule::kPct;
    if (landing == "eager") o.landing = Landing::kEager;
    if (landing == "random") o.landing = Landing::kRandom;
    if (auto s = variable("SIMT_SEED"); !s.empty()) o.seed = strtoull(s.c_str(), nullptr, 0);
    if (auto s = variable("SIMT_BLOCKS"); !s.empty())
      o.resident_blocks = unsigned(strtoul(s.c_str(), nullptr, 0));
    return o;
  }();
  return all;
}
Counters& counters() {
  static Counters all{};
  return all;
}

void fail(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  if (!current) throw Error(buffer);
  end_quiet();
  Thread* me = self();
  snprintf(buffer + strlen(buffer), sizeof buffer - strlen(buffer), " [block %u,%u,%u thread %u]",
           me->block.x, me->block.y, me->block.z, me->linear);
  {
    Quiet quiet;
    fault = buffer;
  }
  sync_release(&done_sync);
  switch_fiber(me->fiber, host);
  abort();  // nobody comes back to a failed thread
}

RegisterTranslated::RegisterTranslated(const char* symbol, TranslatedKernel kernel,
                                       size_t param_bytes) {
  translations()[symbol] = {kernel, param_bytes};
}
bool translated_ptx() { return !translations().empty(); }

void launch(const void* kernel, dim3 grid, dim3 block, size_t smem_bytes, const void* params,
            size_t param_bytes, void (*call)(const void*, const void*)) {
  Dl_info symbol{};
  dladdr(kernel, &symbol);  // needs -rdynamic
  const std::string mangled = symbol.dli_sname ? symbol.dli_sname : "";
  char* readable = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : "kernel";
  free(readable);
  check_limits(name.c_str(), grid, block, smem_bytes);

  job = {kernel, params, call, nullptr};
  if (translated_ptx()) {
    const auto found = translations().find(mangled);
    if (found == translations().end())
      throw Error(name + ": not among the translated kernels (" + mangled + ")");
    if (found->second.param_bytes != param_bytes) {
      throw Error(name + ": parameters have " + std::to_string(param_bytes) + " bytes here, " +
                  std::to_string(found->second.param_bytes) + " for nvcc");
    }
    job.translated = found->second.kernel;
  }

  rng.state = options().seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; ++i) rng.next();
  ++counters().launches;
  const unsigned resident = std::max(1u, options().resident_blocks);
  if (block_dim.x != block.x || block_dim.y != block.y || block_dim.z != block.z)
    change_dimensions(block);
  while (blocks.size() < resident) make_block(block.x * block.y * block.z);
  grid_dim = grid;
  host.adopt_caller();
  sync_release(&launch_sync);

  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (options().schedule != Schedule::kInOrder) {
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[rng.below(unsigned(i))]);
  }
  size_t started = 0, left = order.size();
  polled_at = progress++;
  while (left) {
    for (unsigned i = 0; i < resident && started < order.size(); ++i) {
      if (!blocks[i]->running) start_block(*blocks[i], order[started++], smem_bytes);
    }
    finished = nullptr;
    running_warp = nullptr;
    if (Thread* thread = next_thread()) {
      enter(host, thread);
    } else {
      fault = describe_deadlock();
    }
    current = nullptr;
    if (!fault.empty()) {
      sync_acquire(&done_sync);
      const Error error(name + ": " + fault);
      fault.clear();
      drop_blocks();
      throw error;
    }
    if (finished) {
      finish_block(*finished);
      --left;
    }
  }
  sync_acquire(&done_sync);
}

// --- barriers ----------------------------------------------------------------------------------

static Barrier& arrive(unsigned id, unsigned threads, Site site) {
  Block& block = *self()->owner;
  if (id >= block.barriers.size()) fail("barrier %u: there are 16 (%s)", id, text(site).c_str());
  if (threads % 32)
    fail("barrier %u: %u threads is no multiple of 32 (%s)", id, threads, text(site).c_str());
  Barrier& barrier = block.barriers[id];
  if (!threads && block.live != block.threads.size()) {
    fail("__syncthreads (%s) after %zu threads of the block have exited", text(site).c_str(),
         block.threads.size() - block.live);
  }
  if (!barrier.arrived) {
    barrier.expected = threads;
    barrier.first = site;
  } else if (barrier.expected != threads) {
    fail("barrier %u: %u threads at %s, %u at %s", id, threads, text(site).c_str(),
         barrier.expected, text(barrier.first).c_str());
  } else if (!threads &&
             (!same_line(barrier.first, site) || barrier.first.column() != site.column())) {
    fail("divergent __syncthreads: thread %u at %s:%u, others at %s:%u", current->linear,
         text(site).c_str(), site.column(), text(barrier.first).c_str(), barrier.first.column());
  }
  sync_release(barrier.sync.now());
  ++barrier.arrived;
  return barrier;
}
void barrier(unsigned id, unsigned threads, Site site) {
  Barrier& barrier = arrive(id, threads, site);
  void* sync = barrier.sync.now();
  if (barrier.arrived == (threads ? threads : self()->owner->live)) {
    release(barrier);
    reschedule();
  } else {
    barrier.waiting.push_back(self());
    wait(threads ? "bar.sync" : "__syncthreads", site);
  }
  sync_acquire(sync);
}
void barrier_arrive(unsigned id, unsigned threads, Site site) {
  Barrier& barrier = arrive(id, threads, site);
  if (barrier.arrived == threads) release(barrier);
}
void memory_changed() { ++progress; }
void maybe_yield() {
  if (options().schedule != Schedule::kInOrder && rng.below(4) == 0) {
    if (options().schedule == Schedule::kPct) {
      self()->warp_state->priority = rng.next();
      running_warp = nullptr;
    }
    reschedule();
  }
}
void spin_yield(Site site) {
  {
    Quiet quiet;
    pollers.push_back(self());
  }
  wait("a polling loop", site);
}

// --- warp collectives --------------------------------------------------------------------------

void collective(uint32_t mask, const char* name, WarpFunction fn, const void* in, void* out,
                bool orders_memory, Site site) {
  Thread* me = self();
  Warp& warp = *me->warp_state;
  if (!(mask >> me->lane & 1))
    fail("%s (%s): lane %u is not in mask %08x", name, text(site).c_str(), me->lane, mask);
  if (mask & ~warp.alive) {
    fail("%s (%s): mask %08x names lanes %08x, which have exited", name, text(site).c_str(), mask,
         mask & ~warp.alive);
  }
  ++counters().collectives;
  me->operands = {in, out};
  Meeting* meeting = nullptr;
  for (auto& other : warp.meetings) {
    if (!(other.mask & mask)) continue;
    if (other.mask != mask) {
      fail("%s (%s): mask %08x, but lanes of it wait in %s (%s) with mask %08x", name,
           text(site).c_str(), mask, other.name, text(other.site).c_str(), other.mask);
    }
    if (other.fn != fn || !same_line(other.site, site)) {
      fail("lanes of one warp meet in different operations: %s (%s) and %s (%s)", name,
           text(site).c_str(), other.name, text(other.site).c_str());
    }
    meeting = &other;
  }
  if (!meeting) {
    warp.meetings.push_back({mask, 0, fn, name, site});
    meeting = &warp.meetings.back();
  }
  meeting->arrived |= 1u << me->lane;
  SyncPair& pair = warp.sync[__builtin_ctz(mask)];
  void* sync = pair.now();
  if (orders_memory) sync_release(sync);
  if (meeting->arrived != mask) {
    wait(name, site);
  } else {
    Operands lanes[32] = {};
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      lanes[i] = warp.lane[i]->operands;
      if (warp.lane[i] != me) wake(warp.lane[i]);
    }
    warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
    ++pair.phase;
    if (fn) {
      Quiet quiet;  // other lanes' registers
      fn(mask, lanes);
    }
    if (options().schedule != Schedule::kInOrder) reschedule();
  }
  if (orders_memory) sync_acquire(sync);
}

// --- shared memory -----------------------------------------------------------------------------

void* SmemCarver::take_bytes(size_t bytes) {
  Block& block = *self()->owner;
  used_ = (used_ + kSmemAlign - 1) / kSmemAlign * kSmemAlign + bytes;
  if (used_ > block.smem_bytes) {
    fail("shared memory: the kernel takes %zu bytes and was launched with %zu", used_,
         block.smem_bytes);
  }
  const size_t start = (at_ + kRedzone + kSmemAlign - 1) / kSmemAlign * kSmemAlign;
  at_ = start + bytes;
  if (at_ + kRedzone > kArenaBytes) fail("shared memory: the test's arena is too small");
  unpoison(block.arena + start, bytes);
  return block.arena + start;
}
void smem_open_all() { unpoison(self()->owner->arena, self()->owner->smem_bytes); }
uint8_t* smem_pointer(uint32_t address, size_t bytes, const char* what) {
  if (address + bytes > kArenaBytes) fail("%s: %#x is outside shared memory", what, address);
  return self()->owner->arena + address;
}
bool is_shared(const void* p) {
  const auto offset = static_cast<const uint8_t*>(p) - self()->owner->arena;
  return offset >= 0 && size_t(offset) < kArenaBytes;
}
uint32_t smem_address(const void* p) {
  if (!is_shared(p)) fail("shared address of a pointer that is not to shared memory");
  return uint32_t(static_cast<const uint8_t*>(p) - self()->owner->arena);
}

// --- asynchronous copies -----------------------------------------------------------------------

static void land(const Copy& copy) {
  uint8_t* shared = smem_pointer(copy.shared, copy.bytes, "cp.async");
  if (copy.valid) {
    memcpy(shared, copy.global, copy.bytes);
  } else {
    memset(shared, 0, copy.bytes);
  }
}
void cp_async(uint32_t shared, const void* global, unsigned bytes, bool valid) {
  Quiet quiet;
  if (shared % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async: misaligned %u-byte copy", bytes);
  if (valid && is_shared(global)) fail("cp.async: the source is shared memory");
  counters().cp_async_bytes += bytes;
  const Copy copy{shared, global, bytes, valid};
  const Landing landing = options().landing;
  if (landing == Landing::kEager || (landing == Landing::kRandom && rng.below(2))) {
    land(copy);
  } else {
    self()->open_group.push_back(copy);
  }
}
void cp_async_commit() {
  Quiet quiet;
  self()->groups.push_back(std::move(self()->open_group));
  self()->open_group.clear();
}
void cp_async_wait(unsigned pending_groups) {
  Quiet quiet;
  auto& groups = self()->groups;
  while (groups.size() > pending_groups) {
    for (auto& copy : groups.front()) land(copy);
    groups.pop_front();
  }
}

// --- counters ----------------------------------------------------------------------------------

static Request& request(decltype(Warp::gmem)& all, uint64_t where) {
  return all[{where, self()->access_count[where]++}];
}
void note_gmem(const void* p, unsigned bytes, Site site) {
  Quiet quiet;
  Request& r = request(self()->warp_state->gmem, key(site));
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (auto sector = first / 32; sector <= (first + bytes - 1) / 32; ++sector)
    r.sectors.insert(sector);
  r.bytes += bytes;
}
void note_smem_16(uint32_t address, Site site) {
  Quiet quiet;
  request(self()->warp_state->smem, ~key(site)).quarter[current->lane / 8].push_back(address);
}

}  // namespace simt
