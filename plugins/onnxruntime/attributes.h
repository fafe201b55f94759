// The attributes of a node, read with a sentence for each that is missing or makes no sense.
#ifndef MMM_ONNXRUNTIME_ATTRIBUTES_H
#define MMM_ONNXRUNTIME_ATTRIBUTES_H

#include <cstdint>
#include <limits>
#include <string>

#include "onnxruntime/runtime_api.h"

namespace mmm::ort {

class Attributes {
 public:
  Attributes(const OrtApi& api, const OrtKernelInfo* info, const char* operator_name)
      : api_(api), info_(info), operator_name_(operator_name) {}

  // A number of things, at least 1.
  int32_t integer(const char* name) const {
    const int64_t value = any_integer(name);
    if (value < 1 || value > std::numeric_limits<int32_t>::max()) {
      fail(api_, ORT_INVALID_ARGUMENT,
           std::string("attribute ") + name + " is " + std::to_string(value) + "; it counts something",
           operator_name_);
    }
    return static_cast<int32_t>(value);
  }

  // One of the numbers 0 to `last`.
  int32_t choice(const char* name, int32_t last) const {
    const int64_t value = any_integer(name);
    if (value < 0 || value > last) {
      fail(api_, ORT_INVALID_ARGUMENT,
           std::string("attribute ") + name + " is " + std::to_string(value) + "; wanted 0 to " +
               std::to_string(last),
           operator_name_);
    }
    return static_cast<int32_t>(value);
  }

  // As `choice` of 0 and 1, but 0 where the node has no such attribute.
  int32_t flag(const char* name) const {
    int64_t value = 0;
    if (OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value)) {
      api_.ReleaseStatus(status);
      return 0;
    }
    return choice(name, 1);
  }

  float number(const char* name) const {
    float value = 0;
    found(api_.KernelInfoGetAttribute_float(info_, name, &value), name);
    return value;
  }

  // Refuse a node of another meaning than `version`.
  void check_version(const char* version) const {
    const std::string found = text("plugin_version");
    if (found == version) return;
    fail(api_, ORT_INVALID_ARGUMENT,
         "the node has plugin_version \"" + found + "\" and this library computes \"" + version +
             "\"; use the mmm-export that wrote the bundle, or export it again",
         operator_name_);
  }

  std::string text(const char* name) const {
    size_t bytes = 0;  // with the zero at the end
    found(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &bytes), name);
    std::string value(bytes, '\0');
    found(api_.KernelInfoGetAttribute_string(info_, name, value.data(), &bytes), name);
    return value.substr(0, value.find('\0'));
  }

 private:
  int64_t any_integer(const char* name) const {
    int64_t value = 0;
    found(api_.KernelInfoGetAttribute_int64(info_, name, &value), name);
    return value;
  }

  // ONNX Runtime's own sentence names neither the operator nor what to do.
  void found(OrtStatus* status, const char* name) const {
    if (status == nullptr) return;
    api_.ReleaseStatus(status);
    fail(api_, ORT_INVALID_ARGUMENT,
         std::string("attribute ") + name + " is missing or of another type; export the bundle again",
         operator_name_);
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  const char* operator_name_;
};

// A dimension that fits the interface of the kernels.
inline int32_t size_of(const OrtApi& api, const char* what, int64_t value, const char* operator_name = kScanName) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    fail(api, ORT_INVALID_ARGUMENT, std::string(what) + " is " + std::to_string(value), operator_name);
  }
  return static_cast<int32_t>(value);
}

}  // namespace mmm::ort

#endif
