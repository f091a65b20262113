"""ONNX operators in torch, one file per theme; each file ends with its table."""
