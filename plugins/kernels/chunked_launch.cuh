// What the two implementations of the chunked scan need from each other, in builds with MMM_WARPGROUPS.
#pragma once

#include <cuda_runtime_api.h>

#include "chunked_layout.cuh"

namespace mmm {

// Pass 2, for states of so many entries.
cudaError_t launch_start_states(const ChunkedArgs& args, int state_entries, int batch, cudaStream_t stream, bool overlap);

// All passes on the warpgroup matrix units: two heads a block, head_dim and state_dim 128, conv width 2, compute capability 9.0.
cudaError_t run_warpgroups(const ChunkedArgs& args, bool half, int batch, cudaStream_t stream);

}  // namespace mmm
