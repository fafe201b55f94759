// TensorRT's symbolic dimensions, for a host in which every dimension is a number.
#ifndef MMM_HOST_EXPRESSIONS_H
#define MMM_HOST_EXPRESSIONS_H

#include <algorithm>
#include <deque>

#include "NvInferRuntime.h"

namespace mmm::host {

class ConstantExpression final : public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit ConstantExpression(int64_t value) : value_(value) {}
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  int64_t value_;
};

class Dimension final : public nvinfer1::IDimensionExpr {
 public:
  explicit Dimension(int64_t value) : expression_(value) { mImpl = &expression_; }
  ~Dimension() noexcept override = default;

 private:
  ConstantExpression expression_;
};

// Makes dimensions and owns them.
class ConstantBuilder final : public nvinfer1::apiv::VExprBuilder {
 public:
  const nvinfer1::IDimensionExpr* constant(int64_t value) noexcept override {
    return &dimensions_.emplace_back(value);
  }

  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                            const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) noexcept override {
    using nvinfer1::DimensionOperation;
    const int64_t a = first.getConstantValue(), b = second.getConstantValue();
    switch (operation) {
      case DimensionOperation::kSUM: return constant(a + b);
      case DimensionOperation::kPROD: return constant(a * b);
      case DimensionOperation::kMAX: return constant(std::max(a, b));
      case DimensionOperation::kMIN: return constant(std::min(a, b));
      case DimensionOperation::kSUB: return constant(a - b);
      case DimensionOperation::kEQUAL: return constant(a == b);
      case DimensionOperation::kLESS: return constant(a < b);
      case DimensionOperation::kFLOOR_DIV: return constant(a / b);
      case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
    }
    return nullptr;
  }

  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) noexcept override {
    return nullptr;
  }

 private:
  std::deque<Dimension> dimensions_;  // a deque: pointers to its elements stay valid
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder {
 public:
  ExpressionBuilder() { mImpl = &builder_; }
  ~ExpressionBuilder() noexcept override = default;

 private:
  ConstantBuilder builder_;
};

}  // namespace mmm::host

#endif
