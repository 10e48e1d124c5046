"""Models as ONNX graphs at one tile's size, run by onnxruntime or OpenVINO behind the same `encode` and `decode`."""

from mg.deploy.counting import operations

__all__ = ["operations"]
