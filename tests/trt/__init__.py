"""The build side of TensorRT: graphs lowered and run in ONNX Runtime, plans and folders, engines of TensorRT-RTX."""
