"""The operators of domain `edge` inside ONNX Runtime's CPU provider: one library an instruction set."""
