// SPDX-License-Identifier: Apache-2.0
// A fiber: a stack and a saved stack pointer, switched without the operating system. Also every
// sanitizer hook.
//
// ThreadSanitizer sees each fiber as a thread. A switch makes no happens-before edge: edges come
// only from sync_release/sync_acquire, which the runtime calls where CUDA synchronises. So two
// accesses that CUDA does not order are a race even though the fibers run one after another.
#pragma once
#include <cstddef>

namespace simt {

bool under_asan();
bool under_tsan();

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_size = 0;
  void *tsan = nullptr, *asan_fake_stack = nullptr;

  void create(void (*entry)());  // `entry` calls entered() first and never returns
  void adopt_caller();           // *this stands for the code that is running
  void destroy();
};

void switch_fiber(Fiber& from, Fiber& to);  // returns when somebody switches back to `from`
void entered(Fiber& self);

// Everything before a release of `object` happens before everything after the acquires that follow.
void sync_release(void* object);
void sync_acquire(void* object);

void poison(void* p, size_t bytes);  // AddressSanitizer: not to be touched
void unpoison(void* p, size_t bytes);
void* map_pages(size_t bytes);
void unmap_pages(void* p, size_t bytes);

// The runtime's own traffic, which ThreadSanitizer must not take for the kernel's.
struct Quiet {
  Quiet();
  ~Quiet();
};
void end_quiet();  // before a fiber is abandoned

}  // namespace simt
