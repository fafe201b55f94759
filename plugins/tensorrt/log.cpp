#include "tensorrt/log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

#include "tensorrt/signature.h"

namespace mmm::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  return finder != nullptr ? finder->findLogger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

namespace {

void log_message(const char* name, const char* layer, const char* format, va_list values) {
  char message[640];
  const char* shown = layer != nullptr ? layer : "";
  const int start = std::snprintf(message, sizeof message, "%s%s%.120s: ", name, *shown ? " " : "", shown);
  std::vsnprintf(message + start, sizeof message - start, format, values);
  if (nvinfer1::ILogger* logger = find_logger()) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  } else {
    std::fprintf(stderr, "error: %s\n", message);
  }
}

}  // namespace

void log_operator_error(const char* name, const char* layer, const char* format, ...) noexcept {
  va_list values;
  va_start(values, format);
  log_message(name, layer, format, values);
  va_end(values);
}

void log_error(const char* layer, const char* format, ...) noexcept {
  va_list values;
  va_start(values, format);
  log_message(kName, layer, format, values);
  va_end(values);
}

}  // namespace mmm::tensorrt
