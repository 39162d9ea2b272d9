// SPDX-License-Identifier: Apache-2.0
// A small SIMT machine: runs CUDA kernels on the host, for tests. Every CUDA thread is a fiber on
// one OS thread; fibers switch only at synchronisation points, in an order chosen by a scheduler.
// See tests/cpp/README.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

using Site = std::source_location;  // where in the kernel an operation stands

// Which ready thread runs next: the lowest; any; or that of a warp with random priority, which runs
// as far as it can.
enum class Schedule { kInOrder, kRandom, kPct };
// When the bytes of cp.async arrive: as late as allowed, at once, or either. Each hides what the
// other shows.
enum class Landing { kLazy, kEager, kRandom };

struct Options {
  Schedule schedule = Schedule::kInOrder;
  Landing landing = Landing::kLazy;
  uint64_t seed = 1;
  unsigned resident_blocks = 1;  // blocks whose threads interleave
  // Of sm_90. sm_80 has 163 KiB; sm_86, sm_89 and sm_120 have 99 KiB.
  size_t max_dynamic_smem = 227 * 1024;
};
Options& options();  // at first from SIMT_SCHED, SIMT_ASYNC, SIMT_SEED, SIMT_BLOCKS

struct Counters {
  uint64_t launches, switches, barriers, collectives, mma, ldmatrix, cp_async_bytes;
  // Of ldmatrix and the 16-byte wrappers; a conflict is one more pass over the banks.
  uint64_t smem_requests, smem_conflicts;
  // Of the 16-byte wrappers: 32-byte sectors touched, and the fewest possible.
  uint64_t gmem_requests, gmem_sectors, gmem_ideal_sectors;
};
Counters& counters();  // the caller zeroes them

// A fault the machine itself noticed: divergence, deadlock, a limit, a bad address. Thrown by
// launch().
struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

// What device code may look at.
struct ThreadView {
  dim3 thread, block;
  unsigned linear, lane, warp;
};
extern ThreadView* current;
extern dim3 block_dim, grid_dim;

// --- launching ---
// With translated PTX linked in, the translation of the kernel's symbol runs instead of the g++
// build of its source.
using TranslatedKernel = void (*)(const uint8_t* params);
struct RegisterTranslated {
  RegisterTranslated(const char* symbol, TranslatedKernel kernel, size_t param_bytes);
};
bool translated_ptx();  // is any linked in?

void launch(const void* kernel, dim3 grid, dim3 block, size_t smem_bytes, const void* params,
            size_t param_bytes, void (*call)(const void* kernel, const void* params));

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- block ---
void barrier(unsigned id, unsigned threads, Site site);  // 0 threads: the whole block
void barrier_arrive(unsigned id, unsigned threads, Site site);
void maybe_yield();          // a preemption point, at atomics
void memory_changed();       // by an atomic: polling loops may look again
void spin_yield(Site site);  // in a polling loop: sleeps until something happens

// --- warp: the last lane of `mask` to arrive runs fn over the lanes' operands ---
struct Operands {
  const void* in;
  void* out;
};
using WarpFunction = void (*)(uint32_t mask, Operands* lanes);
void collective(uint32_t mask, const char* name, WarpFunction fn, const void* in, void* out,
                bool orders_memory, Site site);

// --- shared memory: one arena a block; a 32-bit shared address is an offset into it ---
class SmemCarver {
 public:
  template <class T>
  T* take(uint32_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);
  size_t used_ = 0, at_ = 0;  // as on the device; here, with redzones
};
void smem_open_all();  // for translated PTX, which computes its own offsets
uint8_t* smem_pointer(uint32_t address, size_t bytes, const char* what);
uint32_t smem_address(const void* p);
bool is_shared(const void* p);

// --- asynchronous copies ---
void cp_async(uint32_t shared, const void* global, unsigned bytes, bool valid);
void cp_async_commit();
void cp_async_wait(unsigned pending_groups);

// --- counters: the k-th access of each lane at a site forms one request of the warp ---
void note_gmem(const void* p, unsigned bytes, Site site);
void note_smem_16(uint32_t address, Site site);

}  // namespace simt
