#include "host/json_lines.h"

#include <cstdio>

namespace mmm::host {
namespace {

template <typename Value>
std::string list(const std::vector<Value>& values) {
  std::string text;
  for (const Value& value : values) text += (text.empty() ? "" : ", ") + json(value);
  return "[" + text + "]";
}

}  // namespace

std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') quoted += '\\';
    if (static_cast<unsigned char>(letter) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", letter);
      quoted += escape;
    } else {
      quoted += letter;
    }
  }
  return quoted + '"';
}

std::string json(const char* text) { return json(std::string(text)); }

std::string json(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", number);
  return text;
}

std::string json(int64_t number) { return std::to_string(number); }

std::string json(const std::vector<int64_t>& numbers) { return list(numbers); }

std::string json(const std::vector<std::string>& texts) { return list(texts); }

void print_step(const char* name, const std::vector<std::pair<const char*, std::string>>& values) {
  std::printf("{\"step\": %s", json(name).c_str());
  for (const auto& [key, value] : values) std::printf(", \"%s\": %s", key, value.c_str());
  std::printf("}\n");
  std::fflush(stdout);
}

}  // namespace mmm::host
