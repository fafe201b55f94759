// A program that stands in for TensorRT: it drives the very plugin library that users load, on a CPU or a
// GPU, and so proves its numerics where TensorRT itself is not at hand.
#include <cstdio>
#include <exception>

#include "host/failure.h"
#include "host/json_lines.h"
#include "host/life_cycle.h"
#include "host/options.h"
#include "host/product.h"
#include "host/run.h"
#include "tensorrt/linear_plugin.h"

namespace {

using namespace mmm::host;

void drive(const Options& options) {
  static Logger logger;  // the library may log until the process ends
  if (options.operator_name == mmm::tensorrt::kLinearName) {
    drive_product(options, logger);
    print_step("done", {});
    return;
  }
  const Inputs inputs = read_inputs(options.inputs, options.bfloat16);
  const std::vector<int64_t>& projected = inputs.arrays[mmm::tensorrt::kProjected].shape;
  if (projected.size() != 3) {
    throw Failure("projected.npy has a wrong number of dimensions", shape_text(projected),
                  "(batch, tokens, row)");
  }
  const bool has_largest = options.largest.batch > 0 || options.largest.tokens > 0;
  const CallSize largest = has_largest ? options.largest : CallSize{projected[0], projected[1]};

  nvinfer1::IPluginCreatorV3One& creator = load_creator(options.library, options.operator_name, logger);
  const Built built = build(creator, logger, options.fields, inputs, largest);
  if (!options.serialize.empty()) write_fields(options.serialize, built.fields);
  Running plugin(creator, logger,
                 options.deserialize.empty() ? built.fields : fields_from_file(options.deserialize));
  const auto outputs = run(plugin, built, inputs, options);
  for (int32_t i = 0; i < kOutputs; ++i) {
    write_npy(options.outputs + "/" + kTensorNames[kInputs + i] + ".npy", outputs[i]);
  }
  print_step("done", {});
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = options_from_arguments(count, arguments);
    if (options.help) {
      std::fputs(kHelp, stdout);
    } else {
      drive(options);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
