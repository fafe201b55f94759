#include "onnxruntime/linear_operator.h"

#include "onnxruntime/linear_kernel.h"
#include "onnxruntime/linear_signature.h"

namespace mmm::ort {
namespace {

// As for the scan: ONNX Runtime gives a kernel's computation no way to its operator.
struct LoadedKernel {
  const OrtApi& api;
  LinearKernel kernel;
};

ONNXTensorElementDataType type_of(mmm_dtype dtype) {
  switch (dtype) {
    case MMM_FLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case MMM_BFLOAT16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

}  // namespace

// x alone decides which of the operators serves a node. The other inputs differ from node to node in type and number, so that ONNX
// Runtime lets any through, and the kernel checks them when the graph is loaded.
LinearOperator::LinearOperator(const OrtApi& api, mmm_dtype io_dtype, mmm_device device)
    : OrtCustomOp{}, api_(api), io_dtype_(io_dtype), device_(device) {
  OrtCustomOp::version = kApiVersion;
  GetName = [](const OrtCustomOp*) { return kLinearOperator; };
  GetExecutionProviderType = [](const OrtCustomOp* op) {
    return of(op).device_ == MMM_CUDA ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };

  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kLinearMostInputs; };
  GetInputType = [](const OrtCustomOp* op, size_t i) {
    return i == kLinearX ? type_of(of(op).io_dtype_) : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < kLinearLeastInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };

  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };

  // The sums may be added where the residual lies. It comes last, as input 2 to 4, but for kept rows; what else those can be is a constant, which ONNX
  // Runtime never writes.
  GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    static int from[] = {2, 3, 4}, to[] = {0, 0, 0};
    *inputs = from, *outputs = to;
    return 3;
  };
  ReleaseMayInplace = [](int*, int*) {};

  InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) -> OrtStatusPtr {
    return guarded(of(op).api_, [&] { of(op).infer_shapes(context); });
  };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* own_api, const OrtKernelInfo* info,
                      void** kernel) -> OrtStatusPtr {
    return guarded(*own_api, [&] {
      *kernel = new LoadedKernel{*own_api, LinearKernel(*own_api, info, of(op).io_dtype_, of(op).device_)};
    });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
    const LoadedKernel& loaded = *static_cast<const LoadedKernel*>(kernel);
    return guarded(loaded.api, [&] { loaded.kernel.compute(context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<LoadedKernel*>(kernel); };
}

void LinearOperator::infer_shapes(OrtShapeInferContext* context) const {
  OrtTensorTypeAndShapeInfo *x = nullptr, *weight = nullptr;  // the context owns them
  check(api_.ShapeInferContext_GetInputTypeShape(context, kLinearX, &x));
  check(api_.ShapeInferContext_GetInputTypeShape(context, kLinearWeight, &weight));
  size_t rank = 0, weight_rank = 0;
  check(api_.GetDimensionsCount(x, &rank));
  check(api_.GetDimensionsCount(weight, &weight_rank));
  ONNXTensorElementDataType type{};
  check(api_.GetTensorElementType(x, &type));
  if (attribute(context, "float32_output") != 0) type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  OrtTensorTypeAndShapeInfo* made = nullptr;
  check(api_.CreateTensorTypeAndShapeInfo(&made));
  const TensorInfo out(api_, made);
  check(api_.SetTensorElementType(out.get(), type));
  if (rank < 1 || rank > Shape::kMostDims || weight_rank != 2) return;  // the kernel will say what is wrong
  const int64_t kept = kept_rows(context);
  int64_t dims[Shape::kMostDims] = {}, rows[2] = {};
  const char* names[Shape::kMostDims] = {};
  check(api_.GetDimensions(x, dims, rank));
  check(api_.GetSymbolicDimensions(x, names, rank));
  check(api_.GetDimensions(weight, rows, 2));
  const bool silu = attribute(context, "epilogue") == MMM_EPILOGUE_SILU;
  dims[rank - 1] = rows[0] < 0 || kept < 0 ? -1 : silu ? rows[0] / 2 : rows[0] + kept;
  names[rank - 1] = "";
  check(api_.SetDimensions(out.get(), dims, rank));
  check(api_.SetSymbolicDimensions(out.get(), names, rank));
  check(api_.ShapeInferContext_SetOutputTypeShape(context, 0, out.get()));
}

// The rows of the last input, if the node says that it has kept ones; -1 where they are not known.
int64_t LinearOperator::kept_rows(OrtShapeInferContext* context) const {
  const OrtOpAttr* found = nullptr;
  if (OrtStatus* status = api_.ShapeInferContext_GetAttribute(context, "keeps_rows", &found)) {
    api_.ReleaseStatus(status);
    return 0;
  }
  if (found == nullptr || attribute(context, "keeps_rows") == 0) return 0;
  size_t inputs = 0, rank = 0;
  check(api_.ShapeInferContext_GetInputCount(context, &inputs));
  OrtTensorTypeAndShapeInfo* kept = nullptr;
  check(api_.ShapeInferContext_GetInputTypeShape(context, inputs - 1, &kept));
  check(api_.GetDimensionsCount(kept, &rank));
  int64_t dims[2] = {-1, -1};
  if (rank == 2) check(api_.GetDimensions(kept, dims, 2));
  return dims[0];
}

int64_t LinearOperator::attribute(OrtShapeInferContext* context, const char* name) const {
  const OrtOpAttr* found = nullptr;
  check(api_.ShapeInferContext_GetAttribute(context, name, &found));
  int64_t value = 0;
  size_t bytes = 0;
  check(api_.ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof value, &bytes));
  return value;
}

}  // namespace mmm::ort
