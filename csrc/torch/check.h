// SPDX-License-Identifier: Apache-2.0
// Argument checks: one sentence that names the argument, what was expected and what came. All
// checks of an op run before it writes anything.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/params.h"

namespace dlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}

// Checks the arguments of one op. Every method throws std::runtime_error (RuntimeError in Python).
// Messages are put together only when needed: that would cost more than all the checks of a call.
class Check {
 public:
  // `anchor` is the argument whose device all others must share.
  Check(const char* op, const char* anchor_name, const Tensor& anchor)
      : op_(op), anchor_name_(anchor_name), anchor_(anchor) {}

  template <class... Args>
  void that(bool fact, const Args&... message) const {
    if (!fact) throw std::runtime_error(text(op_, ": ", message...));
  }

  static std::string shape(const Tensor& t) {
    std::string out = "[";
    for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
    return out + "]";
  }

  void device(const char* name, const Tensor& t) const {
    that(t.device() == anchor_.device(), name, " must be on the device of ", anchor_name_,
         "; got another device");
  }

  void dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const {
    std::string want;
    for (const ScalarType type : allowed) {
      if (t.scalar_type() == type) return;
      want += text(want.empty() ? "" : " or ", torch::headeronly::toString(type));
    }
    that(false, name, " must have dtype ", want, "; got ",
         torch::headeronly::toString(t.scalar_type()));
  }

  // -1 in `sizes` accepts any extent.
  void sizes(const char* name, const Tensor& t, std::initializer_list<int64_t> want) const {
    bool ok = t.dim() == int64_t(want.size());
    int64_t i = 0;
    for (const int64_t n : want) {
      ok = ok && (n < 0 || t.size(i) == n);
      ++i;
    }
    if (ok) return;
    std::string listed;
    for (const int64_t n : want) {
      listed += text(listed.empty() ? "" : ", ", n < 0 ? std::string("*") : std::to_string(n));
    }
    that(false, name, " must have shape [", listed, "]; got ", shape(t));
  }

  void contiguous(const char* name, const Tensor& t) const {
    if (t.is_contiguous()) return;
    that(false, name, " must be contiguous; got strides ", strides(t));
  }

  // The last dimension must be dense; the others may have any stride.
  void rows_dense(const char* name, const Tensor& t) const {
    const int64_t last = t.dim() - 1;
    if (t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1) return;
    that(false, name, " must have stride 1 in its last dimension; got strides ", strides(t));
  }

  // A contiguous tensor of one dtype and shape: the usual case.
  template <class T>
  const T* dense(const char* name, const Tensor& t, std::initializer_list<int64_t> want) const {
    device(name, t);
    dtype(name, t, {scalar_type<T>()});
    sizes(name, t, want);
    contiguous(name, t);
    return static_cast<const T*>(t.const_data_ptr());
  }
  template <class T>
  const T* dense(const char* name, const MaybeTensor& t,
                 std::initializer_list<int64_t> want) const {
    return t ? dense<T>(name, *t, want) : nullptr;
  }
  template <class T>
  T* dense_mutable(const char* name, const Tensor& t, std::initializer_list<int64_t> want) const {
    dense<T>(name, t, want);
    return static_cast<T*>(t.mutable_data_ptr());
  }
  template <class T>
  T* dense_mutable(const char* name, const MaybeTensor& t,
                   std::initializer_list<int64_t> want) const {
    return t ? dense_mutable<T>(name, *t, want) : nullptr;
  }

  // How many consecutive rows share one of `values` values: all, some, or one each.
  int64_t rows_per_value(const char* name, int64_t values, int64_t rows) const {
    that(values > 0 ? rows % values == 0 : rows == 0, name,
         " must hold one value, or one for each group of consecutive rows (their number divides ",
         rows, "); got ", values);
    return values > 0 && rows > 0 ? rows / values : 1;
  }
  template <class T>
  PerRow<T> per_row(const char* name, const MaybeTensor& t, int64_t rows) const {
    if (!t) return {};
    device(name, *t);
    dtype(name, *t, {scalar_type<T>()});
    if (t->dim() > 1) that(false, name, " must have at most one dimension; got shape ", shape(*t));
    contiguous(name, *t);
    return {static_cast<const T*>(t->const_data_ptr()), rows_per_value(name, t->numel(), rows)};
  }

  template <class T>
  static constexpr ScalarType scalar_type() {
    if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
    if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
    if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
    if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
    if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  }

 private:
  static std::string strides(const Tensor& t) {
    std::string out = "[";
    for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.stride(i));
    return out + "]";
  }

  const char* op_;
  const char* anchor_name_;
  const Tensor& anchor_;
};

inline DType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

}  // namespace dlm
