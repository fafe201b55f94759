// The attributes of the operator as TensorRT passes them: named, typed fields. Engines store them, so names,
// types and meanings are a promise.
#ifndef MMM_TENSORRT_FIELDS_H
#define MMM_TENSORRT_FIELDS_H

#include <cstddef>
#include <cstdint>

#include "NvInferRuntime.h"
#include "tensorrt/signature.h"

namespace mmm::tensorrt {

// Defaults are the released model's: TensorRT only warns about a missing attribute.
struct Fields {
  int32_t heads = 16;
  int32_t kv_heads = 8;
  int32_t head_dim = 128;
  int32_t state_dim = 128;
  float eps = 1e-5f;
};

constexpr size_t kConstant = SIZE_MAX;

// One row of the promise. Every field has one entry; `offset` says where Fields holds it, kConstant that it
// is kVersion.
struct FieldRow {
  const char* name;
  nvinfer1::PluginFieldType type;
  size_t offset;
};

constexpr FieldRow kFieldRows[] = {
    {"heads", nvinfer1::PluginFieldType::kINT32, offsetof(Fields, heads)},
    {"kv_heads", nvinfer1::PluginFieldType::kINT32, offsetof(Fields, kv_heads)},
    {"head_dim", nvinfer1::PluginFieldType::kINT32, offsetof(Fields, head_dim)},
    {"state_dim", nvinfer1::PluginFieldType::kINT32, offsetof(Fields, state_dim)},
    {"eps", nvinfer1::PluginFieldType::kFLOAT32, offsetof(Fields, eps)},
    {"plugin_version", nvinfer1::PluginFieldType::kCHAR, kConstant},
};
constexpr int32_t kFieldCount = sizeof kFieldRows / sizeof kFieldRows[0];

// The fields of an operator, whose kConstant row holds `version`.
struct FieldTable {
  const char* operator_name;
  const char* version;
  const FieldRow* rows;
  int32_t count;
};

constexpr FieldTable kFieldTable = {kName, kVersion, kFieldRows, kFieldCount};

// Read `collection` into the struct `fields` of `table`. Fields that are absent keep their value, unknown ones are ignored. Returns
// false, after logging why, for a field of another type or length, or another plugin_version.
bool read_table(const FieldTable& table, const char* layer, const nvinfer1::PluginFieldCollection* collection,
                void* fields) noexcept;

// Write the fields of the struct `fields` to `rows`, of table.count entries, in TensorRT's form.
void write_table(const FieldTable& table, const void* fields, nvinfer1::PluginField* rows) noexcept;

// Read and check the scan's fields: false as well, after logging why, for sizes that no kernel takes.
bool read_fields(const char* layer, const nvinfer1::PluginFieldCollection* collection,
                 Fields& fields) noexcept;

// The fields of one plugin object in TensorRT's form, valid as long as both exist.
class SerializedFields {
 public:
  const nvinfer1::PluginFieldCollection* of(const Fields& fields) noexcept;

 private:
  nvinfer1::PluginField rows_[kFieldCount];
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace mmm::tensorrt

#endif
