// What the implementations of the chunked scan need from each other.
#pragma once

#include <cuda_runtime_api.h>

#include "chunked_layout.cuh"

namespace mmm {

// Pass 2, for states of so many entries; `fragments`: segments in the order of fragment_entry.
cudaError_t launch_start_states(const ChunkedArgs& args, int state_entries, int batch, cudaStream_t stream, bool overlap,
                                bool fragments);

// All passes on the warpgroup matrix units: two heads a block, head_dim and state_dim 128, conv width 2, compute capability 9.0.
cudaError_t run_warpgroups(const ChunkedArgs& args, bool half, int batch, cudaStream_t stream);

// Short prompts, likewise; any conv width and ratio of heads.
constexpr int kMostShortChunks = 16;
uint64_t short_workspace(const mmm_scan_shape& shape);      // bytes
int64_t short_blocks(const mmm_scan_shape& shape);          // of the last launch: with more than processors the passes are faster
cudaError_t run_short(const ChunkedArgs& args, void* workspace, bool half, int batch, cudaStream_t stream);

}  // namespace mmm
