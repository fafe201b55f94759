"""Names of files, graph tensors and tokens that stages share. `layer` is the global layer index (embedding stack first)."""

from __future__ import annotations

VISION_FILE = "vision.onnx"
EMBEDDING_FILE = "embedding.onnx"
DECODER_FILE = "decoder.onnx"
MANIFEST_FILE = "manifest.json"
GRAPH_FILES = (VISION_FILE, EMBEDDING_FILE, DECODER_FILE)
WEIGHTS_SUFFIX = ".data"

CALIBRATION_FILE = "calibration.json"
SAMPLES_FILE = "samples.safetensors"  # beside a calibration file
DECODER_PLAN = "decoder.plan"  # of an engine folder
VISION_PLAN = "vision.plan"
EMBEDDING_TABLE = "embedding.bin"  # raw rows (vocabulary + special tokens, hidden) in the engine's number format
PLUGIN_LIBRARY = "libmmm_tensorrt.so"
LAYERS_FILE = "layers.json"

GOLDEN_FILE = "golden.safetensors"  # what PyTorch computed, for a verification without PyTorch

CONFIG_FILE = "config.json"  # of a checkpoint
DEMO_MODELS = "demo_models"  # trained checkpoints that come with the package

TOKENIZER_MODEL_FILE = "tokenizer.model"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = (TOKENIZER_MODEL_FILE, ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)

TEMPLATE = "internlm2-chat"  # the only chat template that mmMamba models are trained with
IMAGE_TOKEN = "<IMG_CONTEXT>"  # one for every vector of an image

OP_DOMAIN = "mmm"
OP_NAME = "MmmSelectiveScan"
LINEAR_OP = "MmmLinear"  # in bundles exported with --fuse

PIXEL_VALUES = "pixel_values"  # (tiles, 3, S, S) float32
IMAGE_FEATURES = "image_features"  # (image tokens, hidden)
INPUT_IDS = "input_ids"  # (B, T) int64
INPUTS_EMBEDS = "inputs_embeds"  # (B, T, hidden)
LENGTHS = "lengths"  # (B,) int32: valid tokens of each row in this call
PAST_LENGTHS = "past_lengths"  # (B,) int32: tokens already in the KV cache; only with attention layers
LOGITS = "logits"  # (B, 1, vocab) float32, or (B, T, vocab) when exported with all positions


def past_conv(layer: int) -> str:
    """Conv state before the call: (B, C, K-1)."""
    return f"past.{layer}.conv"


def past_recurrent(layer: int) -> str:
    """SSM state before the call: (B, H, P, N) float32."""
    return f"past.{layer}.recurrent"


def past_key(layer: int) -> str:
    """KV cache of an attention layer before the call: (B, kv_heads, max_tokens, head_dim)."""
    return f"past.{layer}.key"


def past_value(layer: int) -> str:
    """Like `past_key`, the values."""
    return f"past.{layer}.value"


def present(past: str) -> str:
    """The output that holds what the input `past` becomes after the call."""
    return "present" + past.removeprefix("past")
