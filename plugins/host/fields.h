// Plugin fields that the mini host owns: from the command line, from a file, or from a plugin that serialized
// itself.
#ifndef MMM_HOST_FIELDS_H
#define MMM_HOST_FIELDS_H

#include <string>
#include <vector>

#include "NvInferRuntime.h"

namespace mmm::host {

struct Field {
  std::string name;
  nvinfer1::PluginFieldType type;
  std::string bytes;  // of all entries
  int32_t length;     // entries
};

// Text of a field, "heads=int32:4", "eps=float32:1e-05", "plugin_version=char:1", "sizes=int32:4,5"; types
// int32, int64, float32, float64, char. Floats are written with enough digits to be read back as they were.
Field field_from_text(const std::string& text);
std::string text_from_field(const Field& field);

// A file of such texts, one a line.
std::vector<Field> fields_from_file(const std::string& path);
void write_fields(const std::string& path, const std::vector<Field>& fields);

// Copies of what a plugin serialized.
std::vector<Field> fields_from_collection(const nvinfer1::PluginFieldCollection& collection);

// TensorRT's view of `fields`, valid as long as they are.
class FieldView {
 public:
  explicit FieldView(const std::vector<Field>& fields);
  const nvinfer1::PluginFieldCollection* get() const { return &collection_; }

 private:
  std::vector<nvinfer1::PluginField> rows_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace mmm::host

#endif
