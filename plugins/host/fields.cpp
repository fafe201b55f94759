#include "host/fields.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "host/failure.h"

namespace mmm::host {
namespace {

using nvinfer1::PluginFieldType;

struct TypeRow {
  PluginFieldType type;
  const char* name;
  size_t bytes;
};

constexpr TypeRow kTypes[] = {{PluginFieldType::kINT32, "int32", 4},
                              {PluginFieldType::kINT64, "int64", 8},
                              {PluginFieldType::kFLOAT32, "float32", 4},
                              {PluginFieldType::kFLOAT64, "float64", 8},
                              {PluginFieldType::kCHAR, "char", 1}};

template <typename Matches>
const TypeRow& type_row(const std::string& field, const std::string& found, Matches matches) {
  const TypeRow* row = std::find_if(std::begin(kTypes), std::end(kTypes), matches);
  if (row != std::end(kTypes)) return *row;
  throw Failure("field " + field + " has a type that the mini host does not know", found,
                "int32, int64, float32, float64 or char");
}

template <typename Value>
void append(std::string& bytes, Value value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_number(const std::string& name, PluginFieldType type, const std::string& text,
                   std::string& bytes) {
  char* end = nullptr;
  errno = 0;
  if (type == PluginFieldType::kINT32 || type == PluginFieldType::kINT64) {
    const long long value = std::strtoll(text.c_str(), &end, 10);
    if (type == PluginFieldType::kINT64) {
      append(bytes, static_cast<int64_t>(value));
    } else {
      if (value < INT32_MIN || value > INT32_MAX) errno = ERANGE;
      append(bytes, static_cast<int32_t>(value));
    }
  } else if (type == PluginFieldType::kFLOAT32) {
    append(bytes, std::strtof(text.c_str(), &end));
  } else {
    append(bytes, std::strtod(text.c_str(), &end));
  }
  if (errno != 0 || end == text.c_str() || *end != '\0') {
    throw Failure("field " + name + " has a value that is no number of its type", "'" + text + "'",
                  "such as 4 or 1e-5");
  }
}

// One entry of a number field, as text.
std::string number_text(PluginFieldType type, const char* bytes) {
  char text[32];
  switch (type) {
    case PluginFieldType::kINT32: {
      int32_t value;
      std::memcpy(&value, bytes, sizeof value);
      return std::to_string(value);
    }
    case PluginFieldType::kINT64: {
      int64_t value;
      std::memcpy(&value, bytes, sizeof value);
      return std::to_string(value);
    }
    case PluginFieldType::kFLOAT32: {
      float value;
      std::memcpy(&value, bytes, sizeof value);
      std::snprintf(text, sizeof text, "%.9g", static_cast<double>(value));
      return text;
    }
    default: {
      double value;
      std::memcpy(&value, bytes, sizeof value);
      std::snprintf(text, sizeof text, "%.17g", value);
      return text;
    }
  }
}

}  // namespace

Field field_from_text(const std::string& text) {
  const size_t equals = text.find('='), colon = text.find(':');
  if (equals == std::string::npos || equals == 0 || colon == std::string::npos || colon < equals) {
    throw Failure("a field cannot be read", "'" + text + "'", "NAME=TYPE:VALUE, such as heads=int32:4");
  }
  const std::string name = text.substr(0, equals), type = text.substr(equals + 1, colon - equals - 1);
  const std::string value = text.substr(colon + 1);
  const TypeRow& row = type_row(name, type, [&](const TypeRow& known) { return type == known.name; });
  if (row.type == PluginFieldType::kCHAR) return {name, row.type, value, static_cast<int32_t>(value.size())};
  Field field{name, row.type, "", 0};
  for (size_t start = 0; start <= value.size(); ++field.length) {
    const size_t end = std::min(value.find(',', start), value.size());
    append_number(name, row.type, value.substr(start, end - start), field.bytes);
    start = end + 1;
  }
  return field;
}

std::string text_from_field(const Field& field) {
  const std::string number = std::to_string(static_cast<int32_t>(field.type));
  const TypeRow& row =
      type_row(field.name, number, [&](const TypeRow& known) { return field.type == known.type; });
  std::string text = field.name + "=" + row.name + ":";
  if (field.type == PluginFieldType::kCHAR) return text + field.bytes;
  for (int32_t i = 0; i < field.length; ++i) {
    text += (i > 0 ? "," : "") + number_text(field.type, field.bytes.data() + i * row.bytes);
  }
  return text;
}

std::vector<Field> fields_from_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Failure("cannot open " + path);
  std::vector<Field> fields;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty()) fields.push_back(field_from_text(line));
  }
  return fields;
}

void write_fields(const std::string& path, const std::vector<Field>& fields) {
  std::ofstream file(path, std::ios::trunc);
  for (const Field& field : fields) file << text_from_field(field) << '\n';
  file.close();
  if (!file) throw Failure("cannot write " + path);
}

std::vector<Field> fields_from_collection(const nvinfer1::PluginFieldCollection& collection) {
  std::vector<Field> fields;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const nvinfer1::PluginField& given = collection.fields[i];
    const std::string number = std::to_string(static_cast<int32_t>(given.type));
    const TypeRow& row =
        type_row(given.name, number, [&](const TypeRow& known) { return given.type == known.type; });
    const char* data = static_cast<const char*>(given.data);
    fields.push_back({given.name, given.type, std::string(data, given.length * row.bytes), given.length});
  }
  return fields;
}

FieldView::FieldView(const std::vector<Field>& fields) {
  for (const Field& field : fields)
    rows_.emplace_back(field.name.c_str(), field.bytes.data(), field.type, field.length);
  collection_.nbFields = static_cast<int32_t>(rows_.size());
  collection_.fields = rows_.data();
}

}  // namespace mmm::host
