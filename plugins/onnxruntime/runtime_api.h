// ONNX Runtime's C interface with exceptions for its statuses. Only this library throws; nothing is thrown
// across the interface.
#ifndef MMM_ONNXRUNTIME_RUNTIME_API_H
#define MMM_ONNXRUNTIME_RUNTIME_API_H

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>

#include "onnxruntime_c_api.h"

namespace mmm::ort {

// The oldest interface that has all that is called here: shape inference and ParallelFor came with 1.17.
// Asking for it, and not for the one of the header at hand, makes one binary serve every release since.
constexpr uint32_t kApiVersion = 17;

// The first that lets an operator write its output over an input; an older one is not told that it may.
constexpr uint32_t kInPlaceApiVersion = 18;

// A status on its way to ONNX Runtime, which will release it.
struct Failure {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

constexpr char kScanName[] = "mmm::MmmSelectiveScan", kLinearName[] = "mmm::MmmLinear";

[[noreturn]] inline void fail(const OrtApi& api, OrtErrorCode code, const std::string& text,
                              const char* name = kScanName) {
  throw Failure{api.CreateStatus(code, (std::string(name) + ": " + text).c_str())};
}

// Run `body` and turn what it throws into a status.
template <class Body>
OrtStatus* guarded(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

// A shape without memory of its own: a decode step looks at several for every layer.
class Shape {
 public:
  static constexpr size_t kMostDims = 8;

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : rank_(dims.size()) {
    std::copy(dims.begin(), dims.end(), dims_);
  }

  // Room for `rank` dimensions, to be filled through data().
  explicit Shape(size_t rank) : rank_(rank) {}

  size_t rank() const { return rank_; }
  int64_t* data() { return dims_; }
  const int64_t* data() const { return dims_; }
  int64_t operator[](size_t i) const { return dims_[i]; }
  bool operator==(const Shape& other) const {
    return std::equal(dims_, dims_ + rank_, other.dims_, other.dims_ + other.rank_);
  }
  bool operator!=(const Shape& other) const { return !(*this == other); }

  std::string text() const {
    std::string text = "(";
    for (size_t i = 0; i < rank_; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims_[i]);
    return text + ")";
  }

 private:
  int64_t dims_[kMostDims] = {};
  size_t rank_ = 0;
};

// Type and shape of a tensor, owned.
class TensorInfo {
 public:
  TensorInfo(const OrtApi& api, OrtTensorTypeAndShapeInfo* info) : api_(api), info_(info) {}
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;
  ~TensorInfo() { api_.ReleaseTensorTypeAndShapeInfo(info_); }

  static TensorInfo of(const OrtApi& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api.GetTensorTypeAndShape(value, &info));
    return TensorInfo(api, info);
  }

  // Dimensions; -1 for one that is not known before the graph runs.
  Shape shape() const {
    size_t rank = 0;
    check(api_.GetDimensionsCount(info_, &rank));
    if (rank > Shape::kMostDims)
      fail(api_, ORT_INVALID_ARGUMENT, "an input has " + std::to_string(rank) + " dimensions");
    Shape found(rank);
    check(api_.GetDimensions(info_, found.data(), rank));
    return found;
  }

  OrtTensorTypeAndShapeInfo* get() const { return info_; }

 private:
  const OrtApi& api_;
  OrtTensorTypeAndShapeInfo* info_;
};

}  // namespace mmm::ort

#endif
