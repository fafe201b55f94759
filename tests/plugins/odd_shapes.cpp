// Runs the CPU kernels over odd shapes, each array in a heap block of exactly its size, to be compiled with sanitizers. Prints the
// number of calls.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "abi/backend.h"
#include "mmm/kernels.h"

namespace {

// A block of exactly `bytes`, so that the sanitizer sees the first byte too many.
struct Block {
  explicit Block(int64_t bytes, int fill = 0) : data(std::malloc(static_cast<size_t>(bytes))) {
    std::memset(data, fill, static_cast<size_t>(bytes));
  }
  Block(const Block&) = delete;
  ~Block() { std::free(data); }
  void* data;
};

struct Case {
  int32_t batch, tokens, heads, kv_heads, head_dim, state_dim, conv_width;
};

void run(const Case& c, int32_t io, int32_t state, int lengths_kind, bool in_place) {
  mmm_scan_args args = {};
  args.shape = {MMM_ABI_VERSION, MMM_CPU,     io,           state,        c.batch, c.tokens, c.heads, c.kv_heads,
                c.head_dim,      c.state_dim, c.conv_width, 1e-5f, MMM_AUTO};
  const int64_t B = c.batch, T = c.tokens, C = mmm::conv_channels(args.shape), W = mmm::row_width(args.shape);
  const int64_t wide = mmm::element_bytes(io), HP = int64_t{c.heads} * c.head_dim, margin = 64 / wide;
  const int64_t states = B * HP * c.state_dim * mmm::element_bytes(state), conv = B * C * (c.conv_width - 1) * wide;

  args.projected_token_stride = W + margin;
  args.projected_batch_stride = T * args.projected_token_stride;
  const int64_t rows = B * T == 0 ? 0 : (B * T - 1) * args.projected_token_stride + W;
  Block projected(rows * wide, 0x11), conv_state(conv, 0x22), ssm_state(states, 0x12), lengths(B * 4);
  Block conv_weight(C * c.conv_width * 4, 0x3c), conv_bias(C * 4), dt_bias(c.heads * 4), a_log(c.heads * 4);
  Block norm_weight(c.head_dim * 4, 0x3c), y(B * T * HP * wide, 0xff), conv_out(conv, 0xff), ssm_out(states, 0xff);
  for (int64_t b = 0; b < B; ++b) {
    // Each row another length, some outside 0..T.
    static_cast<int32_t*>(lengths.data)[b] = static_cast<int32_t>(b == 0 ? T + 3 : b == 1 ? -1 : T / 2);
  }
  args.projected = projected.data;
  args.lengths = lengths_kind == 0 ? nullptr : static_cast<const int32_t*>(lengths.data);
  args.conv_state = conv_state.data;
  args.ssm_state = ssm_state.data;
  args.conv_weight = static_cast<const float*>(conv_weight.data);
  args.conv_bias = static_cast<const float*>(conv_bias.data);
  args.dt_bias = static_cast<const float*>(dt_bias.data);
  args.A_log = static_cast<const float*>(a_log.data);
  args.norm_weight = static_cast<const float*>(norm_weight.data);
  args.y = y.data;
  args.conv_state_out = conv_out.data;
  args.ssm_state_out = in_place ? ssm_state.data : ssm_out.data;
  mmm_status status;
  if (mmm_selective_scan(&args, &status) != MMM_OK) {
    std::fprintf(stderr, "%s\n", status.text);
    std::exit(1);
  }
}

}  // namespace

int main() {
  const Case cases[] = {{1, 0, 1, 1, 16, 16, 2},  {1, 1, 1, 1, 16, 128, 4}, {2, 1, 4, 2, 128, 16, 3}, {3, 2, 3, 1, 48, 80, 4},
                        {3, 5, 4, 4, 112, 32, 3}, {0, 4, 2, 1, 16, 16, 2},  {4, 9, 6, 3, 128, 128, 2}};
  int calls = 0;
  for (int32_t io : {MMM_FLOAT32, MMM_FLOAT16, MMM_BFLOAT16, MMM_FLOAT64}) {
    for (int32_t state : {MMM_FLOAT32, MMM_FLOAT16, MMM_BFLOAT16, MMM_FLOAT64}) {
      for (int lengths_kind = 0; lengths_kind < 2; ++lengths_kind) {
        for (const Case& c : cases) {
          for (bool in_place : {false, true}) {
            run(c, io, state, lengths_kind, in_place);
            ++calls;
          }
        }
      }
    }
  }
  std::printf("{\"calls\": %d}\n", calls);
}
