"""Speed against peers in the same run; none of them, and not ONNX Runtime, reports to its maker meanwhile."""

import os

import pipeline as pipeline

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
