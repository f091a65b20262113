"""ONNX protobufs and `onnx_ir` models: what is in a file, without taking the weights into memory."""
