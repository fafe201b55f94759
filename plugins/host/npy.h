// Arrays in NumPy's .npy files, versions 1.0 to 3.0 of the format, C order, little-endian.
#ifndef MMM_HOST_NPY_H
#define MMM_HOST_NPY_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mmm::host {

// uint16 stands for bfloat16, which NumPy does not have.
enum class ElementType { kFloat32, kFloat16, kInt32, kUint16, kInt8 };

struct Array {
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

// Bytes of one element.
int64_t element_bytes(ElementType type);

// "float32"
const char* type_name(ElementType type);

// "(2, 3)"
std::string shape_text(const std::vector<int64_t>& shape);

// Elements of an array; throws Failure when their bytes would fit no int64.
int64_t element_count(const std::vector<int64_t>& shape);

// Throws Failure when the file is missing, truncated, too long, or holds another type or order.
Array read_npy(const std::string& path);

// Replaces the file. Throws Failure when it cannot be written.
void write_npy(const std::string& path, const Array& array);

}  // namespace mmm::host

#endif
