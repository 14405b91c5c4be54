"""The queue's run, from object list to shards. Whatever is ruiji imports this first."""

import os

# ONNX Runtime for Linux and macOS sends reports to its maker from version 1.29 on, unless this is set before it loads.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
