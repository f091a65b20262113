"""How a model gets into ONNX Runtime and values out of it, and what its messages mean."""
