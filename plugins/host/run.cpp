#include "host/run.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "host/failure.h"
#include "host/json_lines.h"

namespace mmm::host {
namespace {

using tensorrt::kConvState;
using tensorrt::kConvStateOut;
using tensorrt::kLengths;
using tensorrt::kProjected;
using tensorrt::kSsmState;
using tensorrt::kSsmStateOut;
using tensorrt::kY;

Array array_of(const nvinfer1::PluginTensorDesc& desc, std::vector<char> bytes) {
  return {element_type(desc.type), shape_of(desc.dims), std::move(bytes)};
}

size_t bytes_of(const nvinfer1::PluginTensorDesc& desc) {
  return static_cast<size_t>(element_count(shape_of(desc.dims)) * element_bytes(element_type(desc.type)));
}

// Copies tokens [start, start + part_tokens) of `whole` (B, whole_tokens, row) to `part` (B, part_tokens,
// row), or back.
void copy_tokens(std::vector<char>& whole, std::vector<char>& part, int64_t start, int64_t part_tokens,
                 CallSize size, size_t row_bytes, bool back) {
  for (int64_t b = 0; b < size.batch && part_tokens > 0; ++b) {
    char* in_whole = whole.data() + (b * size.tokens + start) * row_bytes;
    char* in_part = part.data() + b * part_tokens * row_bytes;
    std::memcpy(back ? in_whole : in_part, back ? in_part : in_whole, part_tokens * row_bytes);
  }
}

// lengths of a piece: what is left of each row's length.
std::vector<char> lengths_from(const std::vector<char>& whole, int64_t start, int64_t tokens) {
  std::vector<int32_t> lengths(whole.size() / sizeof(int32_t));
  std::memcpy(lengths.data(), whole.data(), whole.size());
  for (int32_t& length : lengths)
    length = static_cast<int32_t>(std::clamp<int64_t>(length - start, 0, tokens));
  std::vector<char> bytes(whole.size());
  std::memcpy(bytes.data(), lengths.data(), bytes.size());
  return bytes;
}

// One call of a run: some tokens of all rows.
struct Piece {
  int64_t start, tokens;
  Descriptions tensors;
  Buffer projected, lengths, y;
};

class Run {
 public:
  Run(Running& plugin, const Built& built, const Inputs& inputs, const Options& options)
      : plugin_(plugin),
        built_(built),
        options_(options),
        stream_(options.device),
        workspace_(options.device, "the workspace", built.workspace_bytes) {
    const nvinfer1::Dims& projected = built.tensors[kProjected].dims;
    size_ = {projected.d[0], projected.d[1]};
    for (int32_t i = kConvState; i < kInputs; ++i) fixed_.push_back(uploaded(i, inputs.arrays[i].bytes));
    conv_out_.push_back(buffer(kInputs + kConvStateOut));
    if (!options.in_place) ssm_out_.push_back(buffer(kInputs + kSsmStateOut));
    make_pieces(inputs);
  }

  std::array<Array, kOutputs> all() {
    for (int64_t i = 0; i < options_.repeat; ++i) {
      for (const Piece& piece : pieces_) {
        if (pieces_.size() > 1 || i == 0) plugin_.change_shape(piece.tensors);
        call(piece);
        swap_states();
      }
    }
    stream_.wait();
    check_guards();
    print_step("enqueue", {{"calls", json(options_.repeat * static_cast<int64_t>(pieces_.size()))}});
    std::array<Array, kOutputs> outputs;
    outputs[kY] = joined();
    outputs[kConvStateOut] = array_of(built_.tensors[kConvState], conv_in().download());
    outputs[kSsmStateOut] = array_of(built_.tensors[kSsmState], ssm_in().download());
    return outputs;
  }

  void time() {
    const Piece& piece = pieces_.front();
    plugin_.change_shape(piece.tensors);
    const double mean = stream_.time(options_.time, options_.graph, [&] { call(piece); });
    print_step(
        "time",
        {{"calls", json(options_.time)}, {"microseconds", json(mean)}, {"tokens", json(piece.tokens)}});
  }

 private:
  Buffer buffer(int32_t position) const {
    return Buffer(options_.device, kTensorNames[position], bytes_of(built_.tensors[position]));
  }

  Buffer uploaded(int32_t position, const std::vector<char>& bytes) const {
    Buffer made = buffer(position);
    made.upload(bytes);
    return made;
  }

  void make_pieces(const Inputs& inputs) {
    const std::vector<int64_t> split =
        options_.split.empty() ? std::vector<int64_t>{size_.tokens} : options_.split;
    const int64_t total = std::accumulate(split.begin(), split.end(), int64_t{0});
    if (total != size_.tokens) {
      throw Failure("--split does not add up", std::to_string(total) + " tokens",
                    std::to_string(size_.tokens) + ", those of projected");
    }
    int64_t start = 0;
    for (const int64_t tokens : split) {
      check_profile(tokens);
      Descriptions tensors = built_.tensors;
      for (int32_t i = 0; i < kTensors; ++i)
        tensors[i].dims = resized(i, tensors[i].dims, {size_.batch, tokens});
      Piece piece{start,
                  tokens,
                  tensors,
                  {options_.device, "projected", bytes_of(tensors[kProjected])},
                  {options_.device, "lengths", bytes_of(tensors[kLengths])},
                  {options_.device, "y", bytes_of(tensors[kInputs + kY])}};
      std::vector<char> whole = inputs.arrays[kProjected].bytes, part(piece.projected.bytes());
      copy_tokens(whole, part, start, tokens, size_, row_bytes(kProjected), false);
      piece.projected.upload(part);
      piece.lengths.upload(lengths_from(inputs.arrays[kLengths].bytes, start, tokens));
      pieces_.push_back(std::move(piece));
      start += tokens;
    }
  }

  // As TensorRT does: the workspace was sized for the profile, so no larger call may reach the plugin.
  void check_profile(int64_t tokens) const {
    const CallSize& largest = options_.largest;
    if (largest.tokens == 0 || (tokens <= largest.tokens && size_.batch <= largest.batch)) return;
    throw Failure("a call is larger than --profile-max",
                  std::to_string(tokens) + " tokens, batch " + std::to_string(size_.batch),
                  "at most " + std::to_string(largest.tokens) + " tokens, batch " + std::to_string(largest.batch));
  }

  size_t row_bytes(int32_t position) const {
    const nvinfer1::PluginTensorDesc& desc = built_.tensors[position];
    return static_cast<size_t>(desc.dims.d[2] * element_bytes(element_type(desc.type)));
  }

  // Inputs from kConvState on are in fixed_; after an odd number of calls a state lies in its other buffer.
  Buffer& conv_in() { return swapped_ ? conv_out_[0] : fixed_[0]; }
  Buffer& conv_next() { return swapped_ ? fixed_[0] : conv_out_[0]; }
  Buffer& ssm_in() { return swapped_ && !options_.in_place ? ssm_out_[0] : fixed_[kSsmState - kConvState]; }
  Buffer& ssm_next() { return swapped_ || options_.in_place ? fixed_[kSsmState - kConvState] : ssm_out_[0]; }
  void swap_states() { swapped_ = !swapped_; }

  void call(const Piece& piece) {
    const void* inputs[kInputs] = {piece.projected.data(), piece.lengths.data(), conv_in().data(),
                                   ssm_in().data()};
    for (int32_t i = tensorrt::kConvWeight; i < kInputs; ++i) inputs[i] = fixed_[i - kConvState].data();
    void* const outputs[kOutputs] = {piece.y.data(), conv_next().data(), ssm_next().data()};
    plugin_.enqueue(piece.tensors, inputs, outputs, workspace_.data(), stream_.get());
  }

  void check_guards() const {
    workspace_.check_guard();
    for (const auto* buffers : {&fixed_, &conv_out_, &ssm_out_}) {
      for (const Buffer& each : *buffers) each.check_guard();
    }
    for (const Piece& piece : pieces_) {
      piece.y.check_guard();
      piece.projected.check_guard();
    }
  }

  Array joined() const {
    Array y =
        array_of(built_.tensors[kInputs + kY], std::vector<char>(bytes_of(built_.tensors[kInputs + kY])));
    for (const Piece& piece : pieces_) {
      std::vector<char> part = piece.y.download();
      copy_tokens(y.bytes, part, piece.start, piece.tokens, size_, row_bytes(kInputs + kY), true);
    }
    return y;
  }

  Running& plugin_;
  const Built& built_;
  const Options& options_;
  Stream stream_;
  Buffer workspace_;
  CallSize size_{};
  std::vector<Buffer> fixed_, conv_out_, ssm_out_;
  std::vector<Piece> pieces_;
  bool swapped_ = false;
};

}  // namespace

std::array<Array, kOutputs> run(Running& plugin, const Built& built, const Inputs& inputs,
                                const Options& options) {
  plugin.change_shape(
      built.tensors);  // the plugin refuses shapes that do not go together, before memory is laid out by them
  Run calls(plugin, built, inputs, options);
  std::array<Array, kOutputs> outputs = calls.all();
  if (options.time > 0) calls.time();
  return outputs;
}

}  // namespace mmm::host
