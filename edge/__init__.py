"""The device side of minicpm-edge: bundle, plan, executor, engine, command."""

import os

# ONNX Runtime 1.29 and later identifies the device to its maker and reports how it is used, unless told not to before
# it is loaded. What runs on the device stays on the device.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
