// A plugin library, loaded as TensorRT loads it.
#ifndef MMM_HOST_LIBRARY_H
#define MMM_HOST_LIBRARY_H

#include <string>

#include "NvInferRuntime.h"
#include "host/failure.h"

namespace mmm::host {

// Prints what the plugin says to stderr and keeps the last message.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const nvinfer1::AsciiChar* message) noexcept override;
  Severity last_severity() const { return last_severity_; }

  // The failure of a step of the plugin, with what the plugin said of it.
  Failure failure(const std::string& what) const;

 private:
  std::string last_;
  Severity last_severity_ = Severity::kVERBOSE;
};

// The creator of plugin `name` in the library at `path`, which is told to log to `logger`. Throws Failure when it cannot
// be loaded, exports no getCreators or setLoggerFinder, or holds no such creator. Never unloaded: plugins may outlive every
// scope.
nvinfer1::IPluginCreatorV3One& load_creator(const std::string& path, const std::string& name, Logger& logger);

}  // namespace mmm::host

#endif
