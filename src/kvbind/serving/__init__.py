"""The LaCT language model in vLLM: a plugin that makes `vllm serve FOLDER` and `vllm.LLM(FOLDER)` run what we save.

vLLM finds `register` by this package's entry point, in each of its processes. Nothing here is imported before.
"""

from __future__ import annotations


def register() -> None:
    """Make the model known to vLLM; as often as it is called."""
    from kvbind.serving.plugin import register_with_vllm

    register_with_vllm()
