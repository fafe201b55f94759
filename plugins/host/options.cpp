#include "host/options.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "host/failure.h"
#include "tensorrt/linear_plugin.h"

namespace mmm::host {

const char kHelp[] = R"(usage: mmm_mini_host LIBRARY --inputs DIR --outputs DIR [options]

Drive the plugin in LIBRARY through its whole life without TensorRT: build, serialize, load, attach, run.
Inputs are the files projected.npy, lengths.npy, conv_state.npy, ssm_state.npy, conv_weight.npy,
conv_bias.npy, dt_bias.npy, A_log.npy and norm_weight.npy of DIR; y.npy, conv_state_out.npy and
ssm_state_out.npy are written. Each step is one JSON object on stdout. With --operator MmmLinear the inputs are
x.npy, weight.npy and, as the fields call for them, scales.npy, norm_weight.npy and residual.npy; the output is
out.npy, and of the options below --split, --repeat, --in-place-state and --profile-max do not apply.

  --operator NAME          MmmSelectiveScan or MmmLinear  [default: MmmSelectiveScan]

  --field NAME=TYPE:VALUE  an attribute of the node, such as heads=int32:4, eps=float32:1e-5 or
                           plugin_version=char:1; repeatable
  --fields FILE            attributes from a file, one a line
  --serialize FILE         write the fields that an engine would store
  --deserialize FILE       load the plugin from such a file
  --device cpu|cuda        where it runs  [default: cpu]
  --profile-max T,B        build for calls of up to T tokens and batch B
  --split T1,T2,...        run the tokens in calls of these sizes, carrying the states
  --repeat N               run everything N times, carrying the states  [default: 1]
  --in-place-state         give ssm_state and ssm_state_out one address
  --bfloat16               uint16 arrays hold bfloat16
  --time N                 then run the first call N times more and print the mean microseconds
  --graph                  time a CUDA graph of the call
)";

namespace {

int64_t number(const std::string& option, const std::string& text, int64_t least) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (errno != 0 || text.empty() || *end != '\0' || value < least) {
    throw Failure("option " + option + " has a wrong value", "'" + text + "'",
                  "a number of at least " + std::to_string(least));
  }
  return value;
}

std::vector<int64_t> numbers(const std::string& option, const std::string& text) {
  std::vector<int64_t> values;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    values.push_back(number(option, text.substr(start, end - start), 0));
    start = end + 1;
  }
  return values;
}

class Arguments {
 public:
  Arguments(int count, const char* const* texts) : count_(count), texts_(texts) {}

  bool next(std::string& text) {
    if (at_ >= count_) return false;
    text = texts_[at_++];
    return true;
  }

  std::string value_of(const std::string& option) {
    std::string text;
    if (!next(text)) throw Failure("option " + option + " needs a value; see --help");
    return text;
  }

 private:
  int count_, at_ = 1;
  const char* const* texts_;
};

void read_option(const std::string& option, Arguments& arguments, Options& options) {
  const auto value = [&] { return arguments.value_of(option); };
  if (option == "--inputs") {
    options.inputs = value();
  } else if (option == "--operator") {
    options.operator_name = value();
    if (options.operator_name != tensorrt::kName && options.operator_name != tensorrt::kLinearName)
      throw Failure("option --operator has a wrong value", options.operator_name, "MmmSelectiveScan or MmmLinear");
  } else if (option == "--outputs") {
    options.outputs = value();
  } else if (option == "--field") {
    options.fields.push_back(field_from_text(value()));
  } else if (option == "--fields") {
    for (const Field& field : fields_from_file(value())) options.fields.push_back(field);
  } else if (option == "--serialize") {
    options.serialize = value();
  } else if (option == "--deserialize") {
    options.deserialize = value();
  } else if (option == "--device") {
    const std::string device = value();
    if (device != "cpu" && device != "cuda")
      throw Failure("option --device has a wrong value", device, "cpu or cuda");
    options.device = device == "cuda" ? Device::kCuda : Device::kCpu;
  } else if (option == "--profile-max") {
    const std::vector<int64_t> sizes = numbers(option, value());
    if (sizes.size() != 2)
      throw Failure("option --profile-max has a wrong value", std::to_string(sizes.size()) + " numbers",
                    "T,B");
    options.largest = {sizes[1], sizes[0]};
  } else if (option == "--split") {
    options.split = numbers(option, value());
  } else if (option == "--repeat") {
    options.repeat = number(option, value(), 1);
  } else if (option == "--time") {
    options.time = number(option, value(), 1);
  } else if (option == "--in-place-state") {
    options.in_place = true;
  } else if (option == "--bfloat16") {
    options.bfloat16 = true;
  } else if (option == "--graph") {
    options.graph = true;
  } else if (option == "--help") {
    options.help = true;
  } else {
    throw Failure("unknown option " + option + "; see --help");
  }
}

}  // namespace

Options options_from_arguments(int count, const char* const* texts) {
  Options options;
  Arguments arguments(count, texts);
  for (std::string text; arguments.next(text);) {
    if (text.rfind("--", 0) == 0) {
      read_option(text, arguments, options);
    } else if (options.library.empty()) {
      options.library = text;
    } else {
      throw Failure("two libraries: " + options.library + " and " + text + "; see --help");
    }
  }
  const bool complete = !options.library.empty() && !options.inputs.empty() && !options.outputs.empty();
  if (!options.help && !complete) throw Failure("LIBRARY, --inputs and --outputs are needed; see --help");
  if (!options.help) check_device(options.device);
  return options;
}

}  // namespace mmm::host
