#include "host/npy.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#include "host/failure.h"

namespace mmm::host {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6;
constexpr size_t kLongestHeader = 65536;  // ours has about 100 bytes
constexpr size_t kMostDimensions = 8;     // as many as TensorRT's Dims holds

struct TypeRow {
  ElementType type;
  const char* descr;  // NumPy's name
  const char* name;
  int64_t bytes;
};

constexpr TypeRow kTypes[] = {{ElementType::kFloat32, "<f4", "float32", 4},
                              {ElementType::kFloat16, "<f2", "float16", 2},
                              {ElementType::kInt32, "<i4", "int32", 4},
                              {ElementType::kUint16, "<u2", "uint16", 2},
                              {ElementType::kInt8, "|i1", "int8", 1}};

const TypeRow& row_of(ElementType type) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes),
                       [=](const TypeRow& row) { return row.type == type; });
}

// Reads the header's Python dictionary, {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }, front to
// back.
class HeaderReader {
 public:
  HeaderReader(const std::string& path, const std::string& text) : path_(path), text_(text) {}

  // Fills type and shape.
  void read(Array& array) {
    bool has_type = false, has_order = false, has_shape = false;
    expect('{');
    while (!next_is('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr" && !has_type) {
        array.type = type();
        has_type = true;
      } else if (key == "fortran_order" && !has_order) {
        c_order();
        has_order = true;
      } else if (key == "shape" && !has_shape) {
        array.shape = shape();
        has_shape = true;
      } else {
        bad("the key '" + key + "'");
      }
      if (!next_is(',')) {
        expect('}');
        break;
      }
    }
    skip_spaces();
    if (at_ != text_.size()) bad("text after the dictionary");
    if (!has_type || !has_order || !has_shape) bad("no descr, fortran_order or shape");
  }

 private:
  [[noreturn]] void bad(const std::string& found) const {
    throw Failure(path_ + " has a header that is no .npy header", found + " at byte " + std::to_string(at_),
                  "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }");
  }

  void skip_spaces() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  // Passes `wanted` if it comes next.
  bool next_is(char wanted) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!next_is(wanted)) bad(std::string("no '") + wanted + "'");
  }

  std::string quoted() {
    expect('\'');
    const size_t end = text_.find('\'', at_);
    if (end == std::string::npos) bad("a text without an end");
    const std::string value = text_.substr(at_, end - at_);
    at_ = end + 1;
    return value;
  }

  ElementType type() {
    skip_spaces();
    if (at_ < text_.size() && text_[at_] != '\'') bad("a structured type");
    const std::string descr = quoted();
    for (const TypeRow& row : kTypes) {
      if (descr == row.descr) return row.type;
    }
    throw Failure(path_ + " holds another type", descr,
                  "<f4 (float32), <f2 (float16), <i4 (int32) or <u2 (bfloat16 bits)");
  }

  void c_order() {
    skip_spaces();
    if (text_.compare(at_, 5, "False") == 0) {
      at_ += 5;
    } else if (text_.compare(at_, 4, "True") == 0) {
      throw Failure(path_ + " is in another order", "Fortran order", "C order: numpy.ascontiguousarray");
    } else {
      bad("neither False nor True");
    }
  }

  std::vector<int64_t> shape() {
    std::vector<int64_t> sizes;
    expect('(');
    while (!next_is(')')) {
      if (sizes.size() == kMostDimensions) bad("more than 8 dimensions");
      sizes.push_back(number());
      if (!next_is(',')) {
        expect(')');
        break;
      }
    }
    return sizes;
  }

  int64_t number() {
    skip_spaces();
    int64_t value = 0;
    const size_t start = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (__builtin_mul_overflow(value, 10, &value) ||
          __builtin_add_overflow(value, text_[at_] - '0', &value)) {
        bad("a number above 2^63");
      }
    }
    if (at_ == start) bad("no number");
    return value;
  }

  const std::string& path_;
  const std::string& text_;
  size_t at_ = 0;
};

// Reads `count` bytes; `part` names them for the message.
void read_bytes(std::ifstream& file, const std::string& path, const char* part, char* target, int64_t count) {
  if (file.read(target, count)) return;
  throw Failure(path + " ends in the middle of " + part, std::to_string(file.gcount()) + " bytes of it",
                std::to_string(count) + " bytes");
}

int64_t file_bytes(std::ifstream& file) {
  file.seekg(0, std::ios::end);
  const int64_t bytes = file.tellg();
  file.seekg(0);
  return bytes;
}

size_t header_length(std::ifstream& file, const std::string& path) {
  unsigned char start[kMagicBytes + 2], length[4] = {};
  read_bytes(file, path, "the magic number", reinterpret_cast<char*>(start), sizeof start);
  if (std::memcmp(start, kMagic, kMagicBytes) != 0) throw Failure(path + " is no .npy file");
  const int version = start[kMagicBytes];
  if (version < 1 || version > 3) {
    throw Failure(path + " has another version of the .npy format", std::to_string(version), "1, 2 or 3");
  }
  read_bytes(file, path, "the header's length", reinterpret_cast<char*>(length), version == 1 ? 2 : 4);
  const size_t bytes = length[0] | length[1] << 8 | length[2] << 16 | size_t{length[3]} << 24;
  if (bytes > kLongestHeader) {
    throw Failure(path + " has a header that is too long", std::to_string(bytes) + " bytes",
                  "at most " + std::to_string(kLongestHeader));
  }
  return bytes;
}

}  // namespace

int64_t element_bytes(ElementType type) { return row_of(type).bytes; }

const char* type_name(ElementType type) { return row_of(type).name; }

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

int64_t element_count(const std::vector<int64_t>& shape) {
  constexpr int64_t kWidest = 8;  // bytes of an element
  int64_t count = 1, bytes;
  for (const int64_t size : shape) {
    if (size == 0) return 0;
    if (__builtin_mul_overflow(count, size, &count) || __builtin_mul_overflow(count, kWidest, &bytes)) {
      throw Failure("the shape " + shape_text(shape) + " has more than 2^63 bytes");
    }
  }
  return count;
}

Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure("cannot open " + path);
  const int64_t total = file_bytes(file);
  std::string header(header_length(file, path), '\0');
  read_bytes(file, path, "the header", header.data(), static_cast<int64_t>(header.size()));
  Array array;
  HeaderReader(path, header).read(array);
  // Compared before memory is taken: a damaged shape must not ask for terabytes.
  const int64_t wanted = element_count(array.shape) * element_bytes(array.type), found = total - file.tellg();
  if (found != wanted) {
    throw Failure(path + " does not hold what its header says", std::to_string(found) + " bytes of data",
                  std::to_string(wanted) + " for " + shape_text(array.shape) + " " + type_name(array.type));
  }
  array.bytes.resize(static_cast<size_t>(wanted));
  read_bytes(file, path, "the data", array.bytes.data(), wanted);
  return array;
}

void write_npy(const std::string& path, const Array& array) {
  std::string header = std::string("{'descr': '") + row_of(array.type).descr +
                       "', 'fortran_order': False, 'shape': " + shape_text(array.shape) + ", }";
  constexpr size_t kPrefixBytes = kMagicBytes + 4;
  header.append(63 - (kPrefixBytes + header.size()) % 64, ' ');  // the data starts at a multiple of 64 bytes
  header += '\n';
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  const char length[] = {static_cast<char>(header.size() & 255), static_cast<char>(header.size() >> 8)};
  file.write(kMagic, kMagicBytes).write("\x01\x00", 2).write(length, 2);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
  file.close();
  if (!file) throw Failure("cannot write " + path);
}

}  // namespace mmm::host
