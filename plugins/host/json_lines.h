// What the mini host did, one JSON object a line on stdout.
#ifndef MMM_HOST_JSON_LINES_H
#define MMM_HOST_JSON_LINES_H

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mmm::host {

std::string json(const std::string& text);
std::string json(const char* text);
std::string json(double number);
std::string json(int64_t number);
std::string json(const std::vector<int64_t>& numbers);
std::string json(const std::vector<std::string>& texts);

// Prints {"step": name, key: value, ...}. Values are JSON already.
void print_step(const char* name, const std::vector<std::pair<const char*, std::string>>& values);

}  // namespace mmm::host

#endif
