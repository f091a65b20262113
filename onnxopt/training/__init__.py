"""Training: a graph interpreted in torch, fine-tuning and distillation. Needs the extra `onnxopt[torch]`.

Nothing here imports torch before it is needed, so that the rest of onnxopt works without it.
"""
