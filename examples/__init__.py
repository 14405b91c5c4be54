"""Examples. Whatever runs one has imported `pipeline` first, which keeps ONNX Runtime from reporting to its maker."""

import pipeline as pipeline
