#include "tensorrt/creator.h"

#include <new>

#include "mmm/kernels.h"
#include "tensorrt/linear_plugin.h"
#include "tensorrt/log.h"
#include "tensorrt/plugin.h"

namespace mmm::tensorrt {

SelectiveScanCreator::SelectiveScanCreator() noexcept {
  for (int32_t i = 0; i < kFieldCount; ++i) {
    rows_[i] = {kFieldRows[i].name, nullptr, kFieldRows[i].type, 1};
  }
  names_.nbFields = kFieldCount;
  names_.fields = rows_;
}

nvinfer1::IPluginV3* SelectiveScanCreator::createPlugin(const nvinfer1::AsciiChar* name,
                                                        const nvinfer1::PluginFieldCollection* collection,
                                                        nvinfer1::TensorRTPhase) noexcept {
  Fields fields;
  if (!read_fields(name, collection, fields)) return nullptr;
  return new (std::nothrow) SelectiveScanPlugin(name, fields);
}

namespace {

SelectiveScanCreator scan_creator;
LinearCreator linear_creator;
nvinfer1::IPluginCreatorInterface* creators[] = {&scan_creator, &linear_creator};

}  // namespace

}  // namespace mmm::tensorrt

// What TensorRT looks for in a plugin library. Registering this way, and not through getPluginRegistry(),
// needs no symbol of TensorRT, and keeps clear of the registry's layout, which differs between TensorRT 10
// and 11.
extern "C" [[gnu::visibility("default")]] void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  mmm::tensorrt::set_logger_finder(finder);
}

extern "C" [[gnu::visibility("default")]] nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  count = sizeof mmm::tensorrt::creators / sizeof mmm::tensorrt::creators[0];
  return mmm::tensorrt::creators;
}
