// Where the plugin says what is wrong: TensorRT itself only passes a number on.
#ifndef MMM_TENSORRT_LOG_H
#define MMM_TENSORRT_LOG_H

#include "NvInferRuntime.h"

namespace mmm::tensorrt {

// Take messages to the logger that `finder` finds; without one they go to stderr. TensorRT calls this when it
// loads the library.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Log an error of the layer `layer`, which may be null, of the operator `name`.
[[gnu::format(printf, 3, 4)]] void log_operator_error(const char* name, const char* layer, const char* format,
                                                      ...) noexcept;

// Log an error of the scan's layer `layer`, which may be null.
[[gnu::format(printf, 2, 3)]] void log_error(const char* layer, const char* format, ...) noexcept;

}  // namespace mmm::tensorrt

#endif
