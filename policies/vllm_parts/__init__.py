"""vLLM in this process: importing this package prepares it, so it comes before anything of vLLM's.

Its settings are environment variables that it reads as it is imported or started. The engine must live in this process, where the
weights are, and what it logs as it starts is of no use to who trains; set ``VLLM_LOGGING_LEVEL=INFO`` to read it.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the one that takes processors of logits
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
