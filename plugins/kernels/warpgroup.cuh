// Matrix products of a warpgroup (sm_90a): 4 warps, 128 threads, D (64 x N, float32, registers) += A (64 x 16) B (16 x N).
//
// Tiles in shared memory are rows of 128 bytes (64 elements), their 16-byte units swizzled: unit u of row r lies at u ^ (r & 7). A
// tile begins at a multiple of 1,024 bytes. A wider tile is several such tiles, one behind the other. Read along rows (the
// product's inner dimension is the contiguous one) or across them ("transposed": the rows are the inner dimension).
// Thread l of warp w of the group holds rows 16w + l/4 (+8) of D, columns 8j + 2(l%4) (+1): as mma.m16n8k16, and the registers of A
// are laid out as there. Elsewhere the kernels that include this are empty.
#pragma once

#include "matrix.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MMM_HAS_WGMMA 1
#else
#define MMM_HAS_WGMMA 0
#endif

namespace mmm {

constexpr int kTileRow = 128;     // bytes
constexpr int kTileGroup = 1024;  // bytes of 8 rows, after which the swizzle repeats

// Byte offset of 16-byte unit `unit` of row `row` in a tile.
__device__ __forceinline__ int tile_offset(int row, int unit) { return row * kTileRow + ((unit ^ (row & 7)) << 4); }

// Matrix descriptor of a swizzled tile. `next`: bytes from one tile to the next along the contiguous dimension, for operands that
// are read across rows and wider than 64; others ignore it.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int next = 16) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(next >> 4) << 16 |
         static_cast<uint64_t>(kTileGroup >> 4) << 32 | 1ull << 62;
}

// What a thread wrote to shared memory becomes visible to the matrix units; before the barrier that their reader waits at.
__device__ __forceinline__ void publish_to_matrix_units() {
#if MMM_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Registers written so far may be operands of the products that follow.
__device__ __forceinline__ void begin_products() {
#if MMM_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#if MMM_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Wait until at most `Pending` committed groups are under way.
template <int Pending>
__device__ __forceinline__ void wait_products() {
#if MMM_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
// Keep the compiler from moving accesses of these registers across this point.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// 8x8 matrices of 16-bit elements to shared memory, transposed or not; lane l names the row of 16 bytes at `address`.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
#if MMM_HAS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
#endif
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&r)[4]) {
#if MMM_HAS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

#define MMM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MMM_D16(i) MMM_D4(i), MMM_D4(i + 4), MMM_D4(i + 8), MMM_D4(i + 12)
#define MMM_D32(i) MMM_D16(i), MMM_D16(i + 16)
#define MMM_R16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define MMM_R32                                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31}"
#define MMM_R64                                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63}"
#define MMM_WGMMA(n, type) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " "

// The products that the scan is made of. `accumulate` false starts from zero. In the names: A from shared memory (tile) or
// registers (held), then the shape's N; "across": that operand is read across the rows of its tile.
template <typename Element>
struct WarpgroupMatrix;

#define MMM_PRODUCTS(Element, type)                                                                                     \
  template <>                                                                                                           \
  struct WarpgroupMatrix<Element> {                                                                                     \
    static __device__ __forceinline__ void tiles_32(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0;\n" MMM_WGMMA("32", type) MMM_R16                              \
                   ", %16, %17, p, 1, 1, 0, 0;}"                                                                        \
                   : MMM_D16(0)                                                                                         \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                  \
    }                                                                                                                   \
    static __device__ __forceinline__ void tiles_64(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n" MMM_WGMMA("64", type) MMM_R32                              \
                   ", %32, %33, p, 1, 1, 0, 0;}"                                                                        \
                   : MMM_D32(0)                                                                                         \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                  \
    }                                                                                                                   \
    static __device__ __forceinline__ void tiles_128(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {          \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n" MMM_WGMMA("128", type) MMM_R64                             \
                   ", %64, %65, p, 1, 1, 0, 0;}"                                                                        \
                   : MMM_D32(0), MMM_D32(32)                                                                            \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                  \
    }                                                                                                                   \
    static __device__ __forceinline__ void held_64(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n" MMM_WGMMA("64", type) MMM_R32                              \
                   ", {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"                                                             \
                   : MMM_D32(0)                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                              \
    }                                                                                                                   \
    static __device__ __forceinline__ void across_64(float (&d)[32], uint64_t a, uint64_t b) {                          \
      asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;\n" MMM_WGMMA("64", type) MMM_R32 ", %32, %33, p, 1, 1, 1, 0;}"  \
                   : MMM_D32(0)                                                                                         \
                   : "l"(a), "l"(b));                                                                                   \
    }                                                                                                                   \
    static __device__ __forceinline__ void held_across_64(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;\n" MMM_WGMMA("64", type) MMM_R32                                \
                   ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"                                                             \
                   : MMM_D32(0)                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
    }                                                                                                                   \
    static __device__ __forceinline__ void held_across_128(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {        \
      asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;\n" MMM_WGMMA("128", type) MMM_R64                               \
                   ", {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"                                                             \
                   : MMM_D32(0), MMM_D32(32)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
    }                                                                                                                   \
  }

#if MMM_HAS_WGMMA
MMM_PRODUCTS(__nv_bfloat16, "bf16");
MMM_PRODUCTS(__half, "f16");
#endif

}  // namespace mmm
