// Memory of the device under test, with a guard behind every buffer so that a write past its end is seen.
#ifndef MMM_HOST_MEMORY_H
#define MMM_HOST_MEMORY_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mmm::host {

enum class Device { kCpu, kCuda };

// Throws Failure when this program was compiled without CUDA.
void check_device(Device device);

// 256-byte aligned, as TensorRT gives it. Filled with 0xFF, which is NaN in every float type: what is never
// written shows.
class Buffer {
 public:
  Buffer(Device device, std::string name, size_t bytes);
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Both wait for the stream. `from` has as many bytes as the buffer.
  void upload(const std::vector<char>& from);
  std::vector<char> download() const;

  // Throws Failure when something wrote behind the end.
  void check_guard() const;

 private:
  Device device_;
  std::string name_;
  size_t bytes_;
  void* data_ = nullptr;
};

// The stream that calls are enqueued on; null on the CPU.
class Stream {
 public:
  explicit Stream(Device device);
  Stream(const Stream&) = delete;
  ~Stream();

  void* get() const { return stream_; }
  // Throws Failure with CUDA's text when a kernel failed.
  void wait() const;

  // Microseconds that one run of `call` takes, the mean of `runs`, by events on the device or the clock of
  // the CPU. With `graph` the call is captured once into a CUDA graph, which is then launched.
  template <typename Call>
  double time(int64_t runs, bool graph, Call call) const {
    return time_erased(runs, graph, &call, [](void* given) { (*static_cast<Call*>(given))(); });
  }

 private:
  double time_erased(int64_t runs, bool graph, void* call, void (*run)(void*)) const;

  Device device_;
  void* stream_ = nullptr;
};

}  // namespace mmm::host

#endif
