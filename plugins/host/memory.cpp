#include "host/memory.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "host/failure.h"

#ifndef MMM_WITH_CUDA
#define MMM_WITH_CUDA 0
#endif
#if MMM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace mmm::host {
namespace {

constexpr size_t kGuardBytes = 256, kAlignment = 256;
constexpr unsigned char kGuard = 0xA5, kUnwritten = 0xFF;

#if MMM_WITH_CUDA
void check_cuda(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw Failure(std::string(what) + " failed: " + cudaGetErrorString(code));
}
#endif

void* allocate(Device device, size_t bytes) {
  void* data = nullptr;
#if MMM_WITH_CUDA
  if (device == Device::kCuda) {
    check_cuda(cudaMalloc(&data, bytes), "cudaMalloc");
    return data;
  }
#endif
  static_cast<void>(device);
  data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) throw Failure("no memory for " + std::to_string(bytes) + " bytes");
  return data;
}

void fill(Device device, void* data, int value, size_t bytes) {
#if MMM_WITH_CUDA
  if (device == Device::kCuda) return check_cuda(cudaMemset(data, value, bytes), "cudaMemset");
#endif
  static_cast<void>(device);
  std::memset(data, value, bytes);
}

// To, from or within the device.
void copy(Device device, void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
#if MMM_WITH_CUDA
  if (device == Device::kCuda)
    return check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
#endif
  static_cast<void>(device);
  std::memcpy(to, from, bytes);
}

}  // namespace

void check_device(Device device) {
  if (device == Device::kCuda && !MMM_WITH_CUDA) {
    throw Failure("this mini host was built without CUDA", "--device cuda",
                  "--device cpu, or a build with -DMMM_CUDA=ON");
  }
}

Buffer::Buffer(Device device, std::string name, size_t bytes)
    : device_(device), name_(std::move(name)), bytes_(bytes) {
  data_ = allocate(device, bytes + kGuardBytes);
  fill(device, data_, kUnwritten, bytes);
  fill(device, static_cast<char*>(data_) + bytes, kGuard, kGuardBytes);
}

Buffer::Buffer(Buffer&& other) noexcept
    : device_(other.device_), name_(std::move(other.name_)), bytes_(other.bytes_), data_(other.data_) {
  other.data_ = nullptr;
}

Buffer::~Buffer() {
#if MMM_WITH_CUDA
  if (device_ == Device::kCuda) {
    cudaFree(data_);
    return;
  }
#endif
  std::free(data_);
}

void Buffer::upload(const std::vector<char>& from) { copy(device_, data_, from.data(), bytes_); }

std::vector<char> Buffer::download() const {
  std::vector<char> bytes(bytes_);
  copy(device_, bytes.data(), data_, bytes_);
  return bytes;
}

void Buffer::check_guard() const {
  unsigned char guard[kGuardBytes];
  copy(device_, guard, static_cast<const char*>(data_) + bytes_, kGuardBytes);
  for (const unsigned char byte : guard) {
    if (byte != kGuard)
      throw Failure("the plugin wrote behind the " + std::to_string(bytes_) + " bytes of " + name_);
  }
}

Stream::Stream(Device device) : device_(device) {
#if MMM_WITH_CUDA
  if (device == Device::kCuda) {
    cudaStream_t stream;  // waits for the copies of Buffer, which go through the default stream
    check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
    stream_ = stream;
  }
#endif
}

Stream::~Stream() {
#if MMM_WITH_CUDA
  if (device_ == Device::kCuda) cudaStreamDestroy(static_cast<cudaStream_t>(stream_));
#endif
}

void Stream::wait() const {
#if MMM_WITH_CUDA
  if (device_ == Device::kCuda)
    check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_)), "the plugin's kernel");
#endif
}

double Stream::time_erased(int64_t runs, bool graph, void* call, void (*run)(void*)) const {
  constexpr int64_t kWarmUp = 3;
#if MMM_WITH_CUDA
  if (device_ == Device::kCuda) {
    const auto stream = static_cast<cudaStream_t>(stream_);
    cudaGraphExec_t launchable = nullptr;
    if (graph) {
      cudaGraph_t captured;
      check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
      run(call);
      check_cuda(cudaStreamEndCapture(stream, &captured), "capturing the call");
      check_cuda(cudaGraphInstantiate(&launchable, captured, 0), "cudaGraphInstantiate");
      cudaGraphDestroy(captured);
    }
    cudaEvent_t start, end;
    check_cuda(cudaEventCreate(&start), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    for (int64_t i = -kWarmUp; i < runs; ++i) {
      if (i == 0) check_cuda(cudaEventRecord(start, stream), "cudaEventRecord");
      if (graph) {
        check_cuda(cudaGraphLaunch(launchable, stream), "cudaGraphLaunch");
      } else {
        run(call);
      }
    }
    check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
    wait();
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    if (graph) cudaGraphExecDestroy(launchable);
    return 1e3 * milliseconds / static_cast<double>(runs);
  }
#endif
  if (graph) throw Failure("--graph needs a CUDA device", "--device cpu", "--device cuda");
  auto start = std::chrono::steady_clock::now();
  for (int64_t i = -kWarmUp; i < runs; ++i) {
    if (i == 0) start = std::chrono::steady_clock::now();
    run(call);
  }
  const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - start;
  return spent.count() / static_cast<double>(runs);
}

}  // namespace mmm::host
