// SPDX-License-Identifier: Apache-2.0
// DLM_DEF(m, schema, function): registers an op's schema after comparing it with the C++ signature.
// The stable ABI passes 64-bit words and trusts both sides: an `int` read as a `float` would
// silently produce garbage.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace dlm::schema {

template <class T>
struct Name;
template <>
struct Name<torch::stable::Tensor> {
  static std::string get() { return "Tensor"; }
};
template <>
struct Name<int64_t> {
  static std::string get() { return "int"; }
};
template <>
struct Name<double> {
  static std::string get() { return "float"; }
};
template <>
struct Name<bool> {
  static std::string get() { return "bool"; }
};
template <>
struct Name<std::string> {
  static std::string get() { return "str"; }
};
template <class T>
struct Name<std::optional<T>> {
  static std::string get() { return Name<T>::get() + "?"; }
};
template <class T>
struct Name<std::vector<T>> {
  static std::string get() { return Name<T>::get() + "[]"; }
};

template <class... T>
std::string names() {
  std::string out;
  ((out += (out.empty() ? "" : ", ") + Name<std::remove_cv_t<std::remove_reference_t<T>>>::get()),
   ...);
  return "(" + out + ")";
}
template <class T>
struct Results {
  static std::string get() { return "(" + Name<T>::get() + ")"; }
};
template <class... T>
struct Results<std::tuple<T...>> {
  static std::string get() { return names<T...>(); }
};
template <class F>
struct Signature;
template <class R, class... A>
struct Signature<R (*)(A...)> {
  static std::string get() { return names<A...>() + " -> " + Results<R>::get(); }
};

// "(Tensor(a!) x, str rule=\"none\", *, int[] ids=[])" -> "(Tensor, str, int[])": the first word of
// each comma-separated item, without the alias annotation.
inline std::string types(std::string_view list) {
  std::string out, item;
  int depth = 0;
  auto flush = [&] {
    const size_t begin = item.find_first_not_of(' ');
    if (begin != std::string::npos && item[begin] != '*') {
      out += (out.empty() ? "" : ", ") + item.substr(begin, item.find(' ', begin) - begin);
    }
    item.clear();
  };
  bool quoted = false;
  for (const char c : list) {
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    if (c == '(' || c == ')') {
      depth += c == '(' ? 1 : -1;
    } else if (depth == 0 && c == ',') {
      flush();
    } else if (depth == 0) {
      item += c;
    }
  }
  flush();
  return "(" + out + ")";
}

inline std::string normalized(std::string_view schema) {
  const size_t arrow = schema.rfind("->"), open = schema.find('('),
               close = schema.rfind(')', arrow);
  std::string_view results = schema.substr(arrow + 2);
  results.remove_prefix(results.find_first_not_of(' '));
  if (results.front() == '(') results = results.substr(1, results.size() - 2);
  return types(schema.substr(open + 1, close - open - 1)) + " -> " + types(results);
}

template <class F>
const char* checked(const char* schema) {
  const std::string declared = normalized(schema), defined = Signature<F>::get();
  if (declared != defined) {
    throw std::logic_error(std::string("schema ") + schema + " reads as " + declared +
                           " but the function has " + defined);
  }
  return schema;
}

}  // namespace dlm::schema

#define DLM_DEF(m, declaration, function) \
  (m).def(dlm::schema::checked<decltype(&function)>(declaration))
