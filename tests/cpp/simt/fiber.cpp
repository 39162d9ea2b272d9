// SPDX-License-Identifier: Apache-2.0
// Compiled without sanitizers: the hooks are weak, so one object serves the plain, ASan and TSan
// programs.
#include "simt/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void AnnotateIgnoreWritesBegin(const char*, int);
WEAK void AnnotateIgnoreWritesEnd(const char*, int);

// Saves the callee-saved registers on the stack, stores the stack pointer, and continues on another
// stack.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
static void* prepare_stack(char* base, size_t size, void (*entry)()) {
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(base) + size) & ~uintptr_t(15));
  *--top = nullptr;  // so that the stack is aligned at entry as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else  // any machine, with two system calls a switch
#include <ucontext.h>
static void simt_switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* prepare_stack(char* base, size_t size, void (*entry)()) {
  auto context = reinterpret_cast<ucontext_t*>(base);
  getcontext(context);
  context->uc_stack.ss_sp = base + 4096;
  context->uc_stack.ss_size = size - 4096;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

namespace simt {

constexpr size_t kPage = 4096;

bool under_asan() { return __asan_poison_memory_region != nullptr; }
bool under_tsan() { return __tsan_create_fiber != nullptr; }

void Fiber::create(void (*entry)()) {
  stack_size = under_asan() || under_tsan() ? 512 * 1024 : 128 * 1024;
  char* pages = static_cast<char*>(map_pages(kPage + stack_size));
  mprotect(pages, kPage, PROT_NONE);  // an overflow stops here
  stack = pages + kPage;
  stack_pointer = prepare_stack(stack, stack_size, entry);
  if (under_tsan()) tsan = __tsan_create_fiber(0);
}
void Fiber::adopt_caller() {
  if (under_tsan()) tsan = __tsan_get_current_fiber();
  if (stack) return;  // always the same thread, and asking reads all of /proc/self/maps
  pthread_attr_t attributes;
  void* base;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &base, &stack_size);
  pthread_attr_destroy(&attributes);
  stack = static_cast<char*>(base);
}
void Fiber::destroy() {
  unpoison(stack, stack_size);
  unmap_pages(stack - kPage, kPage + stack_size);
  if (under_tsan()) {  // it may have stopped in mid-kernel: what it did happens before what the
                       // caller does now
    void* caller = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan, 0);
    __tsan_switch_to_fiber(caller, 0);
    __tsan_destroy_fiber(tsan);
  }
}

void entered(Fiber& self) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self.asan_fake_stack, nullptr, nullptr);
  }
}
void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_size);
  }
  constexpr unsigned no_sync = 1;
  if (under_tsan()) __tsan_switch_to_fiber(to.tsan, no_sync);
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
  entered(from);
}

void sync_release(void* object) {
  if (__tsan_release) __tsan_release(object);
}
void sync_acquire(void* object) {
  if (__tsan_acquire) __tsan_acquire(object);
}
void poison(void* p, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
}
void unpoison(void* p, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}
void* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}
void unmap_pages(void* p, size_t bytes) { munmap(p, bytes); }

static int quiet_depth;
Quiet::Quiet() {
  ++quiet_depth;
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin("", 0);
}
Quiet::~Quiet() {
  --quiet_depth;
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd("", 0);
}
void end_quiet() {
  while (quiet_depth > 0) {
    --quiet_depth;
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd("", 0);
  }
}

}  // namespace simt
