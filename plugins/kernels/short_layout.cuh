// Short prompts on sm_90a, where three launches of the scan by segments are mostly latency: conv first, then all of the rest on as
// many blocks as there are processors. P = N = 128; up to 16 chunks of 64 tokens, in segments of 4.
//   make_tiles   conv + SiLU of v, k and q, once, as 16-bit tiles; the decays of every chunk
//   make_states  the state at the start of every segment, in 16 bits, and the end state; the segments meet in a cluster
//   make_outputs y of each chunk against the chunks of its segment up to its own, and the state before them
#pragma once

#include "chunk_decays.cuh"
#include "chunked_launch.cuh"
#include "warpgroup.cuh"

namespace mmm {

constexpr int kShortDim = 128;                         // P and N
constexpr int kSegmentChunks = 4;
constexpr int kHalfTileBytes = kChunk * kTileRow;      // 64 tokens x 64 channels, swizzled
constexpr int kTileBytes = 2 * kHalfTileBytes;         // two of them side by side: 128 channels
constexpr int kHalfStateBytes = kShortDim * kTileRow;  // 128 rows of P x 64 of N, swizzled
constexpr int kStateBytes = 2 * kHalfStateBytes;

struct ShortArgs {
  ChunkedArgs scan;
  int chunks, segments;
  unsigned char* tiles;   // (B, chunks, C / 128) tiles, in the order of a projected row: v, k, q
  unsigned char* starts;  // (B, H, segments) start states
  ChunkDecays* decays;    // (B, H, chunks)

  __host__ __device__ __forceinline__ int tiles_of_chunk() const { return 2 * scan.kv_heads + scan.heads; }
  __device__ __forceinline__ unsigned char* tile(int batch, int chunk, int number) const {
    return tiles + (static_cast<int64_t>(batch * chunks + chunk) * tiles_of_chunk() + number) * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* start(int batch, int head, int segment) const {
    return starts + (static_cast<int64_t>(batch * scan.heads + head) * segments + segment) * kStateBytes;
  }
  __device__ __forceinline__ ChunkDecays* decays_of(int batch, int head) const {
    return decays + static_cast<int64_t>(batch * scan.heads + head) * chunks;
  }
  // Chunks of this row of the batch that hold valid tokens.
  __device__ __forceinline__ int filled(int batch) const { return (scan.length(batch) + kChunk - 1) / kChunk; }
};

}  // namespace mmm
