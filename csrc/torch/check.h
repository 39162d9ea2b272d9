// SPDX-License-Identifier: Apache-2.0
// Argument checks. A message is one sentence that names the argument, what was expected and what
// was given. All checks of an op run before it writes anything.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/params.h"
#include "torch/autograd.h"
#include "torch/overlap.h"

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

// An argument with its name; null if it was not given.
struct Argument {
  const char* name;
  const Tensor* tensor;
  Argument(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Argument(const char* name, const MaybeTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
};
using Arguments = std::initializer_list<Argument>;

// Checks the arguments of one op. Every method throws std::runtime_error (RuntimeError in Python).
// Messages are only assembled when needed: that takes longer than all the checks of a call.
class Check {
 public:
  // `anchor` is the argument whose device all others must be on.
  Check(const char* op, const char* anchor_name, const Tensor& anchor)
      : op_(op), anchor_name_(anchor_name), anchor_(anchor) {
    given(anchor_name, anchor);
  }

  template <class... Args>
  void that(bool fact, const Args&... message) const {
    if (!fact) throw std::runtime_error(text(op_, ": ", message...));
  }

  // Reports a failure that is not the fault of an argument.
  template <class... Args>
  [[noreturn]] void failed(const Args&... message) const {
    throw std::runtime_error(text(op_, " failed: ", message...));
  }

  static std::string shape(const Tensor& t) { return listed(t.sizes()); }

  static std::string device_name(const Tensor& t) {
    using torch::headeronly::DeviceType;
    const auto device = t.device();
    const char* type = device.type() == DeviceType::CPU    ? "cpu"
                       : device.type() == DeviceType::CUDA ? "cuda"
                       : device.type() == DeviceType::Meta ? "meta"
                                                           : "another kind of device";
    return device.has_index() ? text(type, ":", int(device.index())) : type;
  }

  // Python's None arrives as an undefined tensor if the schema does not declare `Tensor?`.
  void given(const char* name, const Tensor& t) const {
    if (!t.defined()) that(false, name, " must be a tensor; got None");
  }

  void device(const char* name, const Tensor& t) const {
    given(name, t);
    that(t.device() == anchor_.device(), name, " must be on the device of ", anchor_name_, "; got ",
         device_name(t));
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

  // The usual case: a contiguous tensor of a given dtype and shape.
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
  const uint8_t* mask(const char* name, const MaybeTensor& t,
                      std::initializer_list<int64_t> want) const {
    return reinterpret_cast<const uint8_t*>(dense<bool>(name, t, want));
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

  // Returns how many consecutive rows share each of `values` values: all, some, or one.
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

  // Checks a number that the kernels take as float32.
  float finite_float(const char* name, double value) const {
    if (!std::isfinite(float(value))) that(false, name, " must be finite in float32; got ", value);
    return float(value);
  }
  // Where 0 has a special meaning, also rejects a nonzero number that becomes 0 in float32.
  float float_or_zero(const char* name, double value, const char* zero) const {
    const float x = float(value);
    if (!(x >= 0 && std::isfinite(x)) || (x == 0 && value != 0)) {
      that(false, name, " must be 0 (", zero, ") or positive and finite in float32; got ", value);
    }
    return x;
  }

  // Checks indices in CPU memory; -1 means none.
  template <class T>
  void indices(const char* name, const T* values, int64_t count, int64_t end) const {
    for (int64_t i = 0; values && i < count; ++i) {
      if (values[i] >= -1 && values[i] < end) continue;
      that(false, name, " must be -1 or in [0, ", end, "); got ", values[i], " at ", i);
    }
  }

  // Checks each value of a temperature in CPU memory: its inverse must be finite.
  void temperatures(const char* name, const MaybeTensor& t) const {
    if (!t) return;
    const float* values = static_cast<const float*>(t->const_data_ptr());
    for (int64_t i = 0; i < t->numel(); ++i) {
      const float x = values[i];
      if (x == 0 || (x >= std::numeric_limits<float>::min() && std::isfinite(x))) continue;
      that(false, name, " must be 0, or finite and at least 1.2e-38; got ", x, " at ", i);
    }
  }

  // For ops that return or write floating-point tensors.
  void not_differentiable(Arguments arguments) const {
    if (!grad_mode()) return;
    for (const Argument& a : arguments) {
      if (!a.tensor || !requires_grad(*a.tensor)) continue;
      that(false, "the op is not differentiable, but ", a.name,
           " requires a gradient; call it under torch.no_grad() or pass ", a.name, ".detach()");
    }
  }

  // Checks that tensors which the op writes to do not share memory with any other argument, and
  // tells autograd that they are written.
  void written(Arguments written, Arguments read) const {
    std::vector<std::pair<const char*, Footprint>> targets;
    targets.reserve(written.size());
    const auto apart_from_targets = [&](const Argument& a) {
      const Footprint memory(*a.tensor);
      for (const auto& [name, target] : targets) {
        if (!memory.overlaps(target)) continue;
        that(false, name, " is written to and must not share memory with ", a.name,
             "; pass a clone of one of them");
      }
      return memory;
    };
    for (const Argument& a : written) {
      if (!a.tensor) continue;
      a.tensor->mutable_data_ptr();  // a lazy clone gets its own memory here
      targets.emplace_back(a.name, apart_from_targets(a));
      if (!targets.back().second.overlaps_itself()) continue;
      that(false, a.name, " is written to and must not overlap itself (an expanded tensor?); got ",
           "shape ", shape(*a.tensor), " and strides ", strides(*a.tensor));
    }
    for (const Argument& a : read) {
      if (a.tensor) apart_from_targets(a);
    }
    for (const Argument& a : written) {
      if (a.tensor) bump_version(*a.tensor);
    }
  }

  // Allocates a tensor on the anchor's device.
  Tensor empty(const char* name, std::initializer_list<int64_t> size, ScalarType type) const {
    try {
      return allocated(size, type);
    } catch (const std::exception& error) {
      failed(name, " of shape ", listed(size), " and dtype ", torch::headeronly::toString(type),
             " could not be allocated: ", torch_message(error));
    }
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
  // Uses torch's C function: a call through its dispatcher takes several times as long.
  Tensor allocated(std::initializer_list<int64_t> size, ScalarType type) const {
    std::vector<int64_t> stride(size.size(), 1);
    for (size_t i = size.size(); i-- > 1;)
      stride[i - 1] = stride[i] * std::max<int64_t>(size.begin()[i], 1);
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(anchor_.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(anchor_.get(), &device_index));
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.begin(),
                                                    stride.data(), int32_t(type), device_type,
                                                    device_index, &made));
    return Tensor(made);
  }

  template <class Numbers>
  static std::string listed(const Numbers& numbers) {
    std::string out;
    for (const int64_t n : numbers) out += text(out.empty() ? "" : ", ", n);
    return "[" + out + "]";
  }
  static std::string strides(const Tensor& t) { return listed(t.strides()); }

  // The stable ABI only reports that a call failed; from 2.13 on, torch itself keeps the reason.
  static std::string torch_message(const std::exception& error) {
    static const auto reason = torch_symbol<const char*()>(
        "libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
    return reason ? reason() : error.what();
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
