// Calls of a running plugin over buffers: whole, in pieces, repeated, timed.
#ifndef MMM_HOST_RUN_H
#define MMM_HOST_RUN_H

#include <array>

#include "host/life_cycle.h"
#include "host/options.h"

namespace mmm::host {

// Run `plugin` as `options` say. Returns the outputs: y of all tokens of the last repetition, and the last
// states.
std::array<Array, kOutputs> run(Running& plugin, const Built& built, const Inputs& inputs,
                                const Options& options);

}  // namespace mmm::host

#endif
