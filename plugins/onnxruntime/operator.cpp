#include "onnxruntime/operator.h"

#include "onnxruntime/kernel.h"
#include "onnxruntime/signature.h"

namespace mmm::ort {
namespace {

// ONNX Runtime gives a kernel's computation no way to its operator, so each kernel brings the interface that
// its statuses come from.
struct LoadedKernel {
  const OrtApi& api;
  Kernel kernel;
};

}  // namespace

Operator::Operator(const OrtApi& api, mmm_dtype io_dtype, mmm_device device)
    : OrtCustomOp{}, api_(api), io_dtype_(io_dtype), device_(device) {
  OrtCustomOp::version = kApiVersion;
  GetName = [](const OrtCustomOp*) { return kOperator; };
  GetExecutionProviderType = [](const OrtCustomOp* op) {
    return of(op).device_ == MMM_CUDA ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };

  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  GetInputType = [](const OrtCustomOp* op, size_t i) {
    if (i == kLengths) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    return has_io_type(static_cast<Input>(i)) ? of(op).io_type() : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };

  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return kOutputs; };
  GetOutputType = [](const OrtCustomOp* op, size_t i) {
    return has_io_type(static_cast<Output>(i)) ? of(op).io_type() : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };

  InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) -> OrtStatusPtr {
    return guarded(of(op).api_, [&] { of(op).infer_shapes(context); });
  };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* own_api, const OrtKernelInfo* info,
                      void** kernel) -> OrtStatusPtr {
    return guarded(*own_api, [&] {
      *kernel = new LoadedKernel{*own_api, Kernel(*own_api, info, of(op).io_dtype_, of(op).device_)};
    });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
    const LoadedKernel& loaded = *static_cast<const LoadedKernel*>(kernel);
    return guarded(loaded.api, [&] { loaded.kernel.compute(context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<LoadedKernel*>(kernel); };
}

ONNXTensorElementDataType Operator::io_type() const {
  switch (io_dtype_) {
    case MMM_FLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case MMM_BFLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// ONNX Runtime asks one of the operators for all types, so the types come from the inputs and not from
// `io_dtype_`.
void Operator::infer_shapes(OrtShapeInferContext* context) const {
  const auto input = [&](Input i) {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context owns it
    check(api_.ShapeInferContext_GetInputTypeShape(context, i, &info));
    return info;
  };
  OrtTensorTypeAndShapeInfo* const projected = input(kProjected);
  size_t rank = 0;
  check(api_.GetDimensionsCount(projected, &rank));
  if (rank == 3) {
    int64_t dims[3] = {};
    const char* names[3] = {};
    ONNXTensorElementDataType type{};
    check(api_.GetDimensions(projected, dims, 3));
    check(api_.GetSymbolicDimensions(projected, names, 3));
    check(api_.GetTensorElementType(projected, &type));
    dims[2] = attribute(context, "heads") * attribute(context, "head_dim");
    names[2] = "";
    OrtTensorTypeAndShapeInfo* made = nullptr;
    check(api_.CreateTensorTypeAndShapeInfo(&made));
    const TensorInfo y(api_, made);
    check(api_.SetTensorElementType(y.get(), type));
    check(api_.SetDimensions(y.get(), dims, 3));
    check(api_.SetSymbolicDimensions(y.get(), names, 3));
    check(api_.ShapeInferContext_SetOutputTypeShape(context, kY, y.get()));
  }
  check(api_.ShapeInferContext_SetOutputTypeShape(context, kConvStateOut, input(kConvState)));
  check(api_.ShapeInferContext_SetOutputTypeShape(context, kSsmStateOut, input(kSsmState)));
}

int64_t Operator::attribute(OrtShapeInferContext* context, const char* name) const {
  const OrtOpAttr* found = nullptr;
  check(api_.ShapeInferContext_GetAttribute(context, name, &found));
  int64_t value = 0;
  size_t bytes = 0;
  check(api_.ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof value, &bytes));
  return value;
}

}  // namespace mmm::ort
