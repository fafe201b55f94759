#include "host/library.h"

#include <dlfcn.h>

#include <cstdio>

#include "host/json_lines.h"

namespace mmm::host {
namespace {

class LoggerFinder final : public nvinfer1::ILoggerFinder {
 public:
  nvinfer1::ILogger* logger = nullptr;
  nvinfer1::ILogger* findLogger() override { return logger; }
};

LoggerFinder finder;

template <typename Function>
Function* function_of(void* library, const std::string& path, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr)
    throw Failure(path + " is no plugin library", std::string("no function ") + name, "libmmm_tensorrt.so");
  return reinterpret_cast<Function*>(found);
}

}  // namespace

void Logger::log(Severity severity, const nvinfer1::AsciiChar* message) noexcept {
  last_ = message;
  last_severity_ = severity;
  std::fprintf(stderr, "[plugin] %s\n", message);
}

Failure Logger::failure(const std::string& what) const {
  return Failure(what + "\n  plugin: " + (last_.empty() ? "said nothing" : last_));
}

nvinfer1::IPluginCreatorV3One& load_creator(const std::string& path, const std::string& name, Logger& logger) {
  // Without a slash the dynamic linker would search its own folders.
  const std::string file = path.find('/') == std::string::npos ? "./" + path : path;
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Failure("cannot load " + path, dlerror(), "libmmm_tensorrt.so");
  finder.logger = &logger;
  function_of<void(nvinfer1::ILoggerFinder*)>(library, path, "setLoggerFinder")(&finder);
  int32_t count = 0;
  auto* const creators =
      function_of<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>(library, path, "getCreators")(count);
  nvinfer1::IPluginCreatorV3One* found = nullptr;
  std::string held;
  for (int32_t i = 0; i < count; ++i) {
    auto* const each = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    held += (i > 0 ? ", " : "") + std::string(each->getPluginName());
    if (name == each->getPluginName()) found = each;
  }
  if (found == nullptr) throw Failure(path + " holds no creator of " + name, held.empty() ? "none" : held, name);
  nvinfer1::IPluginCreatorV3One& creator = *found;
  std::vector<std::string> names;
  for (int32_t i = 0; i < creator.getFieldNames()->nbFields; ++i) {
    names.push_back(creator.getFieldNames()->fields[i].name);
  }
  print_step("getCreators", {{"name", json(creator.getPluginName())},
                             {"version", json(creator.getPluginVersion())},
                             {"namespace", json(creator.getPluginNamespace())},
                             {"interface", json(creator.getInterfaceInfo().kind)},
                             {"fields", json(names)}});
  return creator;
}

}  // namespace mmm::host
