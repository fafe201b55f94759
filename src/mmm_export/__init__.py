"""Deploy mmMamba: checkpoint -> ONNX bundle -> engine -> text. See ARCHITECTURE.md for the map of the code."""

__version__ = "0.1.0"
