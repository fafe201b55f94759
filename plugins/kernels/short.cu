// Launches of the prefill of short prompts on sm_90a. Each may start while the one before it ends.
#include "kernel_launch.cuh"
#include "short_outputs.cuh"
#include "short_states.cuh"
#include "short_tiles.cuh"

namespace mmm {
namespace {

template <typename Element>
cudaError_t run(const ShortArgs& args, int batch, cudaStream_t stream) {
  constexpr auto narrow = make_tiles<Element, 2>, wide = make_tiles<Element, 4>;
  constexpr auto states = make_states<Element>, outputs = make_outputs<Element>;
  const ChunkedArgs& scan = args.scan;
  const unsigned heads = scan.heads, rows = batch, tiles = args.tiles_of_chunk(), segments = args.segments;
  cudaError_t error = allow_shared_memory<states>(sizeof(ShortStates::Shared));
  if (error == cudaSuccess) error = allow_shared_memory<outputs>(sizeof(ShortOutputs::Shared));
  if (error == cudaSuccess)
    error = launch(scan.conv_width == 2 ? narrow : wide, {dim3(tiles, args.chunks, rows), 256, 0, stream}, args);
  if (error == cudaSuccess)
    error = launch(states, {dim3(segments, 4 * heads, rows), 128, sizeof(ShortStates::Shared), stream, true, segments}, args);
  if (error != cudaSuccess) return error;
  return launch(outputs, {dim3(2 * segments, heads, rows), 256, sizeof(ShortOutputs::Shared), stream, true}, args);
}

ShortArgs arrange(const ChunkedArgs& scan) {
  ShortArgs args = {};
  args.scan = scan, args.chunks = (scan.tokens + kChunk - 1) / kChunk;
  args.segments = (args.chunks + kSegmentChunks - 1) / kSegmentChunks;
  return args;
}

}  // namespace

uint64_t short_workspace(const mmm_scan_shape& shape) {
  const uint64_t chunks = (static_cast<uint64_t>(shape.tokens) + kChunk - 1) / kChunk;
  const uint64_t starts = (chunks + kSegmentChunks - 1) / kSegmentChunks * kStateBytes;
  const uint64_t tiles = chunks * (2 * shape.kv_heads + shape.heads) * kTileBytes;
  return shape.batch * (tiles + shape.heads * (starts + chunks * sizeof(ChunkDecays)));
}

int64_t short_blocks(const mmm_scan_shape& shape) {
  const int64_t segments = (static_cast<int64_t>(shape.tokens) + kSegmentChunks * kChunk - 1) / (kSegmentChunks * kChunk);
  return 2 * segments * shape.heads * shape.batch;
}

cudaError_t run_short(const ChunkedArgs& scan, void* workspace, bool half, int batch, cudaStream_t stream) {
  ShortArgs args = arrange(scan);
  args.tiles = static_cast<unsigned char*>(workspace);
  args.starts = args.tiles + static_cast<int64_t>(batch) * args.chunks * args.tiles_of_chunk() * kTileBytes;
  const int64_t rows = static_cast<int64_t>(batch) * scan.heads;
  args.decays = reinterpret_cast<ChunkDecays*>(args.starts + rows * args.segments * kStateBytes);
  return half ? run<__half>(args, batch, stream) : run<__nv_bfloat16>(args, batch, stream);
}

}  // namespace mmm
