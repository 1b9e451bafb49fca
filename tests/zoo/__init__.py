"""The model zoo: small, fully randomised transformers, and their ONNX exports."""
