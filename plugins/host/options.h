// The command line of the mini host.
#ifndef MMM_HOST_OPTIONS_H
#define MMM_HOST_OPTIONS_H

#include <string>
#include <vector>

#include "host/fields.h"
#include "host/memory.h"
#include "host/tensors.h"

namespace mmm::host {

struct Options {
  std::string library, inputs, outputs, operator_name = "MmmSelectiveScan";
  std::vector<Field> fields;
  std::string serialize, deserialize;  // files; empty: none
  Device device = Device::kCpu;
  CallSize largest{0, 0};        // of the profile; 0: as large as the inputs
  std::vector<int64_t> split;    // tokens of each call; empty: all at once
  int64_t repeat = 1, time = 0;  // runs with carried states; runs to time
  bool in_place = false, bfloat16 = false, graph = false, help = false;
};

extern const char kHelp[];

// Throws Failure for an unknown option or a value that makes no sense.
Options options_from_arguments(int count, const char* const* arguments);

}  // namespace mmm::host

#endif
