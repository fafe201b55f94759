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

// Read `collection` into `fields`. Fields that are absent keep their value, unknown ones are ignored. Returns
// false, after logging why, for a field of another type or length, another plugin_version, or sizes that no
// kernel takes.
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
