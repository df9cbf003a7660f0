"""Tiny models in folders, and vLLM engines that hold them; where vLLM is not installed, its tests are skipped."""

import os

# one process and few threads, before anything of vLLM is imported
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what would be reached for on a machine without the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
