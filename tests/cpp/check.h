// SPDX-License-Identifier: Apache-2.0
// A small test harness. The same test files run on the host (g++, DLM_SIMT) and, built by nvcc, on
// a GPU.
//
//   TEST(name) { ... }            registers a test; CHECK(condition, "format", ...) inside it
//   for_each_schedule([&] {...})  under every scheduler and copy timing, 1 and 3 blocks at once
//   Array<T>                      memory of the test and the kernel; ASan fences it at both ends
//   run(launch(...))              checks the launch and waits for it
#pragma once
#include <cstdio>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

namespace check {

struct Register {
  Register(const char* name, const char* file, void (*test)());
};
void fail(const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
void passed();
bool failed();  // has the running test failed?
int main(int argc, char** argv);

#define TEST(NAME)                                                     \
  static void NAME();                                                  \
  static const check::Register register_##NAME(#NAME, __FILE__, NAME); \
  static void NAME()

#define CHECK(CONDITION, ...)                       \
  do {                                              \
    if (CONDITION) {                                \
      check::passed();                              \
    } else {                                        \
      check::fail(__FILE__, __LINE__, __VA_ARGS__); \
    }                                               \
  } while (0)

#ifdef DLM_SIMT

void for_each_schedule(const std::function<void()>& body);

// Aligned as cudaMalloc does.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(operator new(n * sizeof(T), std::align_val_t(256)));
  }
  void deallocate(T* p, size_t) { operator delete(p, std::align_val_t(256)); }
  bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Array = std::vector<T, Aligned<T>>;

inline void run(cudaError_t error) {
  CHECK(error == cudaSuccess, "launch: %s", cudaGetErrorString(error));
}

#else

inline void for_each_schedule(const std::function<void()>& body) { body(); }

// Of memory that the host and the GPU share.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t n, T value = T()) : size_(n) {
    if (cudaMallocManaged(&data_, n * sizeof(T) + 16) != cudaSuccess) throw std::bad_alloc();
    for (size_t i = 0; i < n; ++i) data_[i] = value;
  }
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Array() { cudaFree(data_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  void swap(Array& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

inline void run(cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  CHECK(error == cudaSuccess, "launch: %s", cudaGetErrorString(error));
}

#endif

}  // namespace check
