// How the mini host fails: what / found / wanted, printed to stderr before it exits 1.
#ifndef MMM_HOST_FAILURE_H
#define MMM_HOST_FAILURE_H

#include <stdexcept>
#include <string>

namespace mmm::host {

class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& what) : std::runtime_error(what) {}
  Failure(const std::string& what, const std::string& found, const std::string& wanted)
      : std::runtime_error(what + "\n  found:  " + found + "\n  wanted: " + wanted) {}
};

}  // namespace mmm::host

#endif
