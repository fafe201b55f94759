/*
 * The kernels of mmm-export, as a C interface: C99 and C++17, plain data, no allocation, no synchronisation, no exception. The
 * matrix products of a decode step are one call each, see mmm_linear_shape; everything between those of a Mamba-2 layer is another:
 *
 *     conv      u_t = silu(bias + sum_i weight_i raw_{t-K+1+i})        over the C channels [v | k | q]
 *     delta     d_t = softplus(dt_t + dt_bias)                          per head
 *     scan      S_t = exp(-exp(A_log) d_t) S_{t-1} + d_t v_t k_t^T      S is (P, N) per head
 *     readout   y_t = rms_norm(S_t q_t) * norm_weight * silu(gate_t)
 *
 * Letters: B batch, T tokens, H heads, G kv_heads (H is a multiple of G; head h uses v and k of kv head h / (H / G)), P head_dim,
 * N state_dim, K conv_width, C = G*P + G*N + H*N conv channels, W = C + H*P + H the width of a projected row.
 * All strides are in elements. Every pointer is aligned to its element, see mmm_scan_args for what must be aligned to more.
 */
#ifndef MMM_KERNELS_H
#define MMM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or the meaning of a field changes. Every loader compares it with mmm_abi_version(). */
#define MMM_ABI_VERSION 3

#if defined(_WIN32)
#define MMM_API __declspec(dllexport)
#else
#define MMM_API __attribute__((visibility("default")))
#endif

/* What a call returns; the text of mmm_status says more. */
typedef enum mmm_code {
  MMM_OK = 0,
  MMM_INVALID_ARGUMENT = 1,  /* a shape, stride or pointer that no kernel could take */
  MMM_UNSUPPORTED = 2,       /* valid, but this library has no kernel for it */
  MMM_WORKSPACE_TOO_SMALL = 3,
  MMM_WRONG_DEVICE = 4,      /* no CUDA device, or none that this library has machine code for */
  MMM_CUDA_ERROR = 5         /* CUDA refused a launch */
} mmm_code;

typedef enum mmm_dtype { MMM_FLOAT32 = 0, MMM_FLOAT16 = 1, MMM_BFLOAT16 = 2, MMM_FLOAT64 = 3 /* CPU only */ } mmm_dtype;

typedef enum mmm_device { MMM_CPU = 0, MMM_CUDA = 1 } mmm_device;

/* How the recurrence is computed. MMM_AUTO is what users want; the others exist so that tests can compare them. */
typedef enum mmm_method {
  MMM_AUTO = 0,       /* MMM_STEP for one token; for more MMM_CHUNKED where it exists, else MMM_SEQUENTIAL */
  MMM_STEP = 1,       /* one launch for one token (T == 1) */
  MMM_CHUNKED = 2,    /* matrix products over chunks of tokens; fp16 and bf16, 128x128 and 64x64 */
  MMM_SEQUENTIAL = 3  /* token by token, any size, any type */
} mmm_method;

#define MMM_STATUS_TEXT_BYTES 384

/* Code and, unless it is MMM_OK, one sentence that says what was found and what was wanted. */
typedef struct mmm_status {
  int32_t code; /* mmm_code */
  char text[MMM_STATUS_TEXT_BYTES];
} mmm_status;

/* Sizes and types of a call. 52 bytes of plain data. */
typedef struct mmm_scan_shape {
  int32_t abi_version; /* MMM_ABI_VERSION */
  int32_t device;      /* mmm_device */
  int32_t io_dtype;    /* mmm_dtype of projected, conv_state, conv_state_out and y */
  int32_t state_dtype; /* mmm_dtype of ssm_state and ssm_state_out; float32 unless memory is short (a bf16 state drifts) */
  int32_t batch;       /* B >= 0 */
  int32_t tokens;      /* T >= 0 */
  int32_t heads;       /* H, a multiple of G */
  int32_t kv_heads;    /* G >= 1 */
  int32_t head_dim;    /* P, a multiple of 16, 16..128 */
  int32_t state_dim;   /* N, a multiple of 16, 16..128 */
  int32_t conv_width;  /* K, 2..4 */
  float eps;           /* of the RMS norm, > 0 */
  int32_t method;      /* mmm_method */
} mmm_scan_shape;

/*
 * One call. On CUDA all pointers are device memory and everything is enqueued on `stream`; on the CPU it is host memory.
 * With T == 0, or for a row with length 0, the states are copied through.
 */
typedef struct mmm_scan_args {
  mmm_scan_shape shape;
  int32_t segments; /* pieces that MMM_CHUNKED cuts a sequence into; 0 chooses by the device. For tests and tuning */
  int32_t overlap;  /* 1: promise that the kernel before this one on the stream writes none of the states and weights, so
                       that on sm_90 and newer they may be read while it still runs (programmatic dependent launch) */

  const void* projected;     /* (B, T, W) io_dtype, rows [v | k | q | gate | dt]; 16-byte aligned; may be a strided view: */
  int64_t projected_batch_stride; /* elements from row (b, t) to (b+1, t) */
  int64_t projected_token_stride; /* elements from row (b, t) to (b, t+1), >= W, multiple of 16 bytes for MMM_CHUNKED */
  const int32_t* lengths;    /* (B,) valid tokens of each row, taken into 0..T; NULL: all rows are full. What lies past a length
                                is never read into a state; y there is written as zero */
  const void* conv_state;    /* (B, C, K-1) io_dtype, raw inputs before this call, oldest first */
  const void* ssm_state;     /* (B, H, P, N) state_dtype, contiguous, 16-byte aligned */
  const float* conv_weight;  /* (C, K) */
  const float* conv_bias;    /* (C,) */
  const float* dt_bias;      /* (H,) */
  const float* A_log;        /* (H,) */
  const float* norm_weight;  /* (P,), shared by all heads */

  void* y;                   /* (B, T, H*P) io_dtype, contiguous, 16-byte aligned */
  void* conv_state_out;      /* (B, C, K-1) io_dtype; must not overlap conv_state: several blocks read each of its rows */
  void* ssm_state_out;       /* (B, H, P, N) state_dtype; either ssm_state itself (updates in place) or disjoint from it */

  void* workspace;           /* device memory, 256-byte aligned; may be NULL when mmm_selective_scan_workspace gives 0 */
  uint64_t workspace_bytes;
  void* stream;              /* cudaStream_t; ignored on the CPU */
} mmm_scan_args;

/*
 * The matrix products around the scan: out = epilogue(x W^T), with x (M, K) and a weight of N rows of K inputs each, and, if asked
 * for, an RMS norm of x first: x_k = round(round(x_k / sqrt(mean(x^2) + eps)) * norm_weight_k), rounded to io_dtype as written.
 * Sums are float32. Made for M = 1..8, a decode step, where a call costs the bytes of its weight; right for every M.
 */

/* How a weight lies in memory. Rows are contiguous, row after row. */
typedef enum mmm_weight_format {
  MMM_WEIGHT_PLAIN = 0, /* (N, K) io_dtype; no scales */
  MMM_WEIGHT_INT8 = 1,  /* (N, K) int8, scales (N,) float32: w = scale[n] * q[n][k] */
  MMM_WEIGHT_INT4 = 2   /* (N, K/2) bytes, the low nibble first: byte b holds k = 2b in its bits 0..3 and k = 2b+1 in its bits 4..7,
                           each as q + 8 with q in -8..7; scales (N, K/128): w = scale[n][k/128] * q[n][k] */
} mmm_weight_format;

#define MMM_INT4_GROUP 128 /* inputs that share a scale */

/* What becomes of the sums. */
typedef enum mmm_epilogue {
  MMM_EPILOGUE_NONE = 0,     /* out (M, N) = sums */
  MMM_EPILOGUE_RESIDUAL = 1, /* out (M, N) = residual + sums */
  MMM_EPILOGUE_SILU = 2      /* the weight is [gate | up], N/2 rows each: out (M, N/2) = silu(gate) * up */
} mmm_epilogue;

/* Sizes and types of a product. 52 bytes of plain data. */
typedef struct mmm_linear_shape {
  int32_t abi_version;   /* MMM_ABI_VERSION */
  int32_t device;        /* mmm_device */
  int32_t io_dtype;      /* mmm_dtype of x, norm_weight, residual and a plain weight; float32 on the CPU only */
  int32_t out_dtype;     /* mmm_dtype of out: io_dtype, or float32 (logits) */
  int32_t weight_format; /* mmm_weight_format */
  int32_t scale_dtype;   /* mmm_dtype of scales: float32 for INT8, float16 or bfloat16 for INT4; not looked at for a plain weight */
  int32_t epilogue;      /* mmm_epilogue */
  int32_t normalise;     /* 1: RMS norm of x first; 0: x as it is */
  int32_t tokens;        /* M >= 0, rows of x, of whatever sequences */
  int32_t outputs;       /* N >= 1, rows of the weight; even for MMM_EPILOGUE_SILU */
  int32_t inputs;        /* K >= 1; a multiple of 128 for INT4, on CUDA of 16 */
  float eps;             /* of the RMS norm, > 0; not looked at without it */
  int32_t kept;          /* rows at the end of an integer weight that are not quantized, and lie in kept_weight; 0 for a plain weight
                            and for MMM_EPILOGUE_SILU */
} mmm_linear_shape;

/* One product. On CUDA all pointers are device memory and everything is enqueued on `stream`; on the CPU it is host memory. */
typedef struct mmm_linear_args {
  mmm_linear_shape shape;
  int32_t variant; /* 0: chosen by the device. Others are for tests and tuning, see linear.cu */
  int32_t overlap; /* 1: promise that the kernel before this one on the stream writes neither weight, scales nor norm_weight, so that
                      on sm_90 and newer they may be read while it still runs (programmatic dependent launch) */
  const void* x;           /* (M, K) io_dtype, 16-byte aligned */
  int64_t x_stride;        /* elements from row to row, >= K; on CUDA a multiple of 8 */
  const void* weight;      /* see mmm_weight_format; 16-byte aligned */
  const void* scales;      /* see mmm_weight_format; 16-byte aligned; NULL for a plain weight */
  const void* norm_weight; /* (K,) io_dtype, 16-byte aligned; NULL unless normalise */
  const void* kept_weight; /* (kept, K) io_dtype, 16-byte aligned; NULL unless the shape keeps rows. `weight` and `scales` have N - kept */
  const void* residual;    /* (M, N) io_dtype, contiguous, 16-byte aligned; NULL unless MMM_EPILOGUE_RESIDUAL */
  void* out;               /* (M, N) or (M, N/2) out_dtype, contiguous, 16-byte aligned; may be residual itself where the types are equal
                              (updates in place), else it overlaps nothing */
  void* workspace;         /* device memory, 256-byte aligned; may be NULL when mmm_linear_workspace gives 0 */
  uint64_t workspace_bytes;
  void* stream;            /* cudaStream_t; ignored on the CPU */
} mmm_linear_args;

/* The MMM_ABI_VERSION that the library was built with. */
MMM_API int32_t mmm_abi_version(void);

/* One line of JSON: {"version": ..., "abi": 3, "cuda": "13.0" or null, "architectures": [87, 90], "compiler": ...}. Static memory. */
MMM_API const char* mmm_build_info(void);

/*
 * Bytes of workspace for `shape`. Never decreases when batch or tokens grow, so that a buffer sized for the largest call serves
 * every smaller one; independent of the device at hand, so that it can be asked where there is none.
 */
MMM_API int32_t mmm_selective_scan_workspace(const mmm_scan_shape* shape, uint64_t* bytes, mmm_status* status);

/*
 * Run (CPU) or enqueue (CUDA) one call. Deterministic: equal inputs give equal bits. Can be captured into a CUDA graph.
 * Returns the code that it also writes to `status`, which may be NULL. Nothing is written unless it returns MMM_OK.
 */
MMM_API int32_t mmm_selective_scan(const mmm_scan_args* args, mmm_status* status);

/* Bytes of workspace for `shape`, as mmm_selective_scan_workspace: never fewer for more tokens, and the same on every device. */
MMM_API int32_t mmm_linear_workspace(const mmm_linear_shape* shape, uint64_t* bytes, mmm_status* status);

/* Run (CPU) or enqueue (CUDA) one product, with the promises of mmm_selective_scan. */
MMM_API int32_t mmm_linear(const mmm_linear_args* args, mmm_status* status);

#ifdef __cplusplus
}
#endif
#endif
