#include "tensorrt/fields.h"

#include <cstring>

#include "tensorrt/geometry.h"
#include "tensorrt/log.h"

namespace mmm::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const char* type_name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16: return "float16";
    case PluginFieldType::kFLOAT32: return "float32";
    case PluginFieldType::kFLOAT64: return "float64";
    case PluginFieldType::kINT8: return "int8";
    case PluginFieldType::kINT16: return "int16";
    case PluginFieldType::kINT32: return "int32";
    case PluginFieldType::kCHAR: return "char";
    case PluginFieldType::kINT64: return "int64";
    default: return "of another type";
  }
}

// A text's length without the closing zero that some parsers count.
int32_t text_length(const PluginField& field) {
  const char* text = static_cast<const char*>(field.data);
  return field.length > 0 && text[field.length - 1] == '\0' ? field.length - 1 : field.length;
}

bool read_version(const FieldTable& table, const char* layer, const PluginField& field) {
  const int32_t length = text_length(field);
  if (length == static_cast<int32_t>(std::strlen(table.version)) &&
      std::memcmp(field.data, table.version, length) == 0)
    return true;
  log_operator_error(table.operator_name, layer,
            "plugin_version is \"%.*s\"; this library knows \"%s\". Use the library that came with the "
            "bundle or engine",
            length < 32 ? length : 32, static_cast<const char*>(field.data), table.version);
  return false;
}

bool read_field(const FieldTable& table, const char* layer, const PluginField& field, const FieldRow& row,
                void* fields) {
  const bool is_text = row.offset == kConstant;
  if (field.type != row.type || field.data == nullptr || field.length < 0 ||
      (!is_text && field.length != 1)) {
    log_operator_error(table.operator_name, layer, "field %s is %s with %d entries%s; wanted %s with 1", row.name, type_name(field.type),
              field.length, field.data == nullptr ? " and no data" : "", type_name(row.type));
    return false;
  }
  if (is_text) return read_version(table, layer, field);
  // Every number has 4 bytes. Copied, since nothing promises that a parser aligns its data.
  std::memcpy(static_cast<char*>(fields) + row.offset, field.data, 4);
  return true;
}

}  // namespace

bool read_table(const FieldTable& table, const char* layer, const nvinfer1::PluginFieldCollection* collection,
                void* fields) noexcept {
  if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr)) {
    log_operator_error(table.operator_name, layer, "no field collection; wanted one, if with no fields");
    return false;
  }
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    for (int32_t k = 0; k < table.count; ++k) {
      if (field.name == nullptr || std::strcmp(field.name, table.rows[k].name) != 0) continue;
      if (!read_field(table, layer, field, table.rows[k], fields)) return false;
    }
  }
  return true;
}

void write_table(const FieldTable& table, const void* fields, nvinfer1::PluginField* rows) noexcept {
  for (int32_t i = 0; i < table.count; ++i) {
    const FieldRow& row = table.rows[i];
    const void* data =
        row.offset == kConstant ? table.version : static_cast<const char*>(fields) + row.offset;
    rows[i] = {row.name, data, row.type, 1};
  }
}

bool read_fields(const char* layer, const nvinfer1::PluginFieldCollection* collection,
                 Fields& fields) noexcept {
  return read_table(kFieldTable, layer, collection, &fields) && check_fields(layer, fields);
}

const nvinfer1::PluginFieldCollection* SerializedFields::of(const Fields& fields) noexcept {
  write_table(kFieldTable, &fields, rows_);
  collection_.nbFields = kFieldCount;
  collection_.fields = rows_;
  return &collection_;
}

}  // namespace mmm::tensorrt
