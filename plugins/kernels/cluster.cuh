// Thread-block clusters of sm_90 and newer: blocks that run together and write into each other's shared memory.
// On older architectures everything here is for a cluster of one block, which is how the kernels are then launched.
#pragma once

#include <stdint.h>

#include "matrix.cuh"

namespace mmm {

// A one-time mailbox in shared memory: every block of the cluster stores into it with store_and_count, and wait() returns when
// `bytes` have arrived. One thread opens it and, after a __syncwarp, expects them; the others may store after a cluster barrier
// (relaxed is enough) that follows.
// No block may leave before its own wait returned: then nothing more is sent to it.
struct Mailbox {
  uint64_t barrier;

  __device__ __forceinline__ void open();
  __device__ __forceinline__ void expect(uint32_t bytes);
  __device__ __forceinline__ void wait() const;
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_rank() {  // of this block in its cluster
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// The address, in block `rank`, of what lies at the shared address `local` here.
__device__ __forceinline__ uint32_t address_in_block(uint32_t local, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  return remote;
}

// Each arrive needs its wait before the next arrive. Released: what this thread wrote before is seen after the others' wait.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ float load_from_block(uint32_t remote) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(remote) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_4_from_block(uint32_t remote) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(remote) : "memory");
  return x;
}
__device__ __forceinline__ void store_in_block(uint32_t remote, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(x) : "memory");
}

__device__ __forceinline__ void Mailbox::open() {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void Mailbox::expect(uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void Mailbox::wait() const {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier))
      : "memory");
}

// Store x at the shared address `local` of block `rank`, and count its 4 bytes in that block's mailbox.
__device__ __forceinline__ void store_and_count(uint32_t local, const Mailbox& mailbox, int rank, float x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_in_block(local, rank)),
      "r"(__float_as_uint(x)), "r"(address_in_block(shared_address(&mailbox.barrier), rank))
      : "memory");
}

#else

__device__ __forceinline__ int cluster_rank() { return 0; }

#endif

}  // namespace mmm
