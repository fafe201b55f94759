// The life of a plugin as TensorRT leads it: built and asked in one phase, serialized, made again and
// attached in the next.
#ifndef MMM_HOST_LIFE_CYCLE_H
#define MMM_HOST_LIFE_CYCLE_H

#include <memory>
#include <vector>

#include "host/failure.h"
#include "host/fields.h"
#include "host/library.h"
#include "host/tensors.h"

namespace mmm::host {

template <typename Capability>
Capability& capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type) {
  nvinfer1::IPluginCapability* found = plugin.getCapabilityInterface(type);
  if (found == nullptr) throw Failure("the plugin lacks a capability");
  return *static_cast<Capability*>(found);
}

// A plugin of one phase. Throws Failure when the creator gives none.
std::unique_ptr<nvinfer1::IPluginV3> create(nvinfer1::IPluginCreatorV3One& creator, const Logger& logger,
                                            const std::vector<Field>& fields, nvinfer1::TensorRTPhase phase);

// What an engine keeps of a built plugin.
struct Built {
  std::vector<Field> fields;
  Descriptions tensors;  // of the call that it was built for
  size_t workspace_bytes;
};

// Run the build phase for inputs like `inputs`, in a profile that reaches to `largest`. Every step is
// printed. Throws Failure at the first step that the plugin refuses.
Built build(nvinfer1::IPluginCreatorV3One& creator, const Logger& logger, const std::vector<Field>& fields,
            const Inputs& inputs, CallSize largest);

// A plugin of the runtime phase, attached to an execution context.
class Running {
 public:
  Running(nvinfer1::IPluginCreatorV3One& creator, const Logger& logger, const std::vector<Field>& fields);

  // Tell the plugin the shapes of the calls that follow.
  void change_shape(const Descriptions& tensors);

  // One call, by position; `tensors` are those of the last change_shape.
  void enqueue(const Descriptions& tensors, const void* const* inputs, void* const* outputs, void* workspace,
               void* stream);

 private:
  const Logger& logger_;
  std::unique_ptr<nvinfer1::IPluginV3> loaded_, attached_;
  nvinfer1::IPluginV3OneRuntime* runtime_ = nullptr;
};

}  // namespace mmm::host

#endif
