// What ONNX Runtime calls when this library is registered with a session:
// SessionOptions.register_custom_ops_library in Python.
#include <list>
#include <map>
#include <mutex>
#include <string>

#include "onnxruntime/linear_operator.h"
#include "onnxruntime/operator.h"
#include "onnxruntime/signature.h"

#ifndef MMM_WITH_CUDA
#define MMM_WITH_CUDA 0
#endif

namespace mmm::ort {
namespace {

constexpr mmm_dtype kIoTypes[] = {MMM_FLOAT32, MMM_FLOAT16, MMM_BFLOAT16};

// The operators of one ONNX Runtime; a process may have loaded several.
struct Registration {
  std::list<Operator> operators;  // lists, so that they stay where they are
  std::list<LinearOperator> linear_operators;
  OrtCustomOpDomain* domain = nullptr;
};

const Registration& registration_of(const OrtApi& api, const OrtApiBase& base) {
  static std::mutex mutex;
  // Never freed: sessions use it, and who ends first at exit, this library or ONNX Runtime, is not known.
  static auto* const all = new std::map<const OrtApi*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  Registration& found = (*all)[&api];
  if (found.domain != nullptr) return found;
  OrtCustomOpDomain* domain = nullptr;
  check(api.CreateCustomOpDomain(kDomain, &domain));
  const uint32_t linear_version = base.GetApi(kInPlaceApiVersion) != nullptr ? kInPlaceApiVersion : kApiVersion;
  const auto add = [&](auto& operators, mmm_dtype type, mmm_device device) {
    operators.emplace_back(api, type, device);
    check(api.CustomOpDomain_Add(domain, &operators.back()));
  };
  const auto add_linear = [&](mmm_dtype type, mmm_device device) {
    add(found.linear_operators, type, device);
    found.linear_operators.back().version = linear_version;
  };
  for (const mmm_dtype type : kIoTypes) {
    add(found.operators, type, MMM_CPU);
    add_linear(type, MMM_CPU);
#if MMM_WITH_CUDA
    add(found.operators, type, MMM_CUDA);
    if (type != MMM_FLOAT32) add_linear(type, MMM_CUDA);  // the one without a kernel
#endif
  }
  found.domain = domain;
  return found;
}

// The status that an ONNX Runtime which is too old gets, from the one function that every release has.
OrtStatus* too_old(const OrtApiBase& base) {
  const OrtApi* oldest = base.GetApi(1);
  if (oldest == nullptr) return nullptr;
  const std::string text = "mmm::MmmSelectiveScan: this is ONNX Runtime " +
                           std::string(base.GetVersionString()) + "; wanted 1." +
                           std::to_string(kApiVersion) + " or newer";
  return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
}

}  // namespace
}  // namespace mmm::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace mmm::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) return too_old(*base);
  return guarded(*api, [&] { check(api->AddCustomOpDomain(options, registration_of(*api, *base).domain)); });
}
