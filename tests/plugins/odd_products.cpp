// Every odd shape of a matrix product on the CPU, each array in an allocation of exactly its size, for the sanitizers.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "abi/backend.h"
#include "mmm/kernels.h"

namespace {

struct Block {
  void* data;
  explicit Block(size_t bytes) : data(std::malloc(bytes)) {  // 16-byte aligned
    for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(data)[i] = static_cast<unsigned char>(17 * i + 3) & 0x3f;
  }
  Block(const Block&) = delete;
  ~Block() { std::free(data); }
};

}  // namespace

int main() {
  long calls = 0;
  for (int format = 0; format < 3; ++format)
    for (int dtype = 0; dtype < 3; ++dtype)
      for (int epilogue = 0; epilogue < 3; ++epilogue)
        for (int normalise = 0; normalise < 2; ++normalise)
          for (int tokens : {0, 1, 8, 9})
            for (int outputs : {2, 32, 70})
              for (int inputs : {1, 17, 128, 640})
                for (int kept : {0, 1}) {
                  if (format == MMM_WEIGHT_INT4 && inputs % MMM_INT4_GROUP != 0) continue;
                  if (kept > 0 && (format == MMM_WEIGHT_PLAIN || epilogue == MMM_EPILOGUE_SILU)) continue;
                  mmm_linear_args args{};
                  mmm_linear_shape& s = args.shape;
                  s = {MMM_ABI_VERSION, MMM_CPU, dtype,     dtype, format, format == MMM_WEIGHT_INT4 ? MMM_FLOAT16 : MMM_FLOAT32,
                       epilogue,        normalise, tokens, outputs, inputs, 1e-5f, kept};
                  const size_t element = static_cast<size_t>(mmm::element_bytes(dtype));
                  const size_t rows = static_cast<size_t>(outputs - kept), elements = rows * inputs;
                  const Block x(element * tokens * inputs), norm(element * inputs), residual(element * tokens * outputs);
                  const Block weight(format == MMM_WEIGHT_PLAIN ? element * elements : format == MMM_WEIGHT_INT8 ? elements : elements / 2);
                  const Block scales(format == MMM_WEIGHT_INT8 ? 4u * rows : elements / 64);
                  const Block kept_rows(element * kept * inputs);
                  const Block out(element * tokens * static_cast<size_t>(mmm::linear_columns(s)));
                  args.x = x.data, args.x_stride = inputs, args.weight = weight.data, args.scales = scales.data;
                  args.norm_weight = norm.data, args.residual = residual.data, args.out = out.data;
                  args.kept_weight = kept > 0 ? kept_rows.data : nullptr;
                  mmm_status status;
                  if (mmm_linear(&args, &status) != MMM_OK) {
                    std::fprintf(stderr, "%s\n", status.text);
                    return 1;
                  }
                  ++calls;
                }
  std::printf("{\"calls\": %ld}\n", calls);
  return 0;
}
