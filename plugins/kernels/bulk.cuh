// Bulk copies of sm_90 and newer: one thread asks for a whole contiguous piece of global memory, and a barrier in shared memory
// counts the bytes that have arrived. Elsewhere empty, for kernels that are never launched there.
#pragma once

#include <stdint.h>

#include "matrix.cuh"

namespace mmm {

// Counts arrivals and bytes; its phases complete one after the other, and are told apart by their parity.
struct Counter {
  uint64_t barrier;

#if __CUDA_ARCH__ >= 900
  // By one thread, before a barrier of all who use it.
  __device__ __forceinline__ void open(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  // Arrive, and let the phase wait for so many bytes as well.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
  }
  // Until the phase of this parity is complete.
  __device__ __forceinline__ void wait(int parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
  }
#else
  __device__ __forceinline__ void open(int) {}
  __device__ __forceinline__ void expect(int) {}
  __device__ __forceinline__ void wait(int) const {}
#endif
};

// `bytes` (a multiple of 16) from global to shared memory, both aligned to 16 bytes; `counter` expects them.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Counter& counter) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(&counter.barrier))
               : "memory");
#endif
}

}  // namespace mmm
