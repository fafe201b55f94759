// The life of the plugin MmmLinear, whose inputs depend on its fields, and one call of it.
#ifndef MMM_HOST_PRODUCT_H
#define MMM_HOST_PRODUCT_H

#include "host/library.h"
#include "host/options.h"

namespace mmm::host {

// Build, serialize, load, attach and run the plugin as `options` say; writes out.npy. Throws Failure at the first step that the plugin
// refuses.
void drive_product(const Options& options, Logger& logger);

}  // namespace mmm::host

#endif
