"""What vLLM is told of the model: its configuration, its class, the layouts of its states, and what it cannot run."""

from __future__ import annotations

import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

# registers the configuration with transformers, from which vLLM reads it
from kvbind.models.lact import LactConfig, LactForCausalLM
from kvbind.serving.checks import check_servable
from kvbind.serving.names import ARCHITECTURE, SLOTS
from kvbind.serving.sizes import RequestSize, check_slots

BACKEND = "KVBIND_FAST_WEIGHTS"
"""vLLM's name of the states' layout."""


class ServedConfig(VerifyAndUpdateConfig):
    """vLLM calls this with the whole configuration, before any process or memory is taken."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, and say of each block that it has both kinds of layers."""
        model = vllm_config.model_config
        config = model.hf_config
        assert isinstance(config, LactConfig)
        speculative = vllm_config.speculative_config
        check_servable(
            config,
            ranks=vllm_config.parallel_config.tensor_parallel_size,
            pipeline=vllm_config.parallel_config.pipeline_parallel_size,
            quantization=model.quantization,
            cache_dtype=vllm_config.cache_config.cache_dtype,
            speculative=None if speculative is None else str(speculative.method),
        )
        further = vllm_config.additional_config
        if isinstance(further, dict) and SLOTS in further:
            cached = bool(vllm_config.cache_config.enable_prefix_caching)
            ranks, step = vllm_config.parallel_config.tensor_parallel_size, vllm_config.cache_config.block_size
            size = RequestSize.of(config, model.dtype.itemsize, ranks=ranks, step=step, cached=cached)
            check_slots(further[SLOTS], size, pool_bytes(vllm_config))


def pool_bytes(vllm_config: VllmConfig) -> int:
    """Bytes that a rank's pool can have, as far as is known before the model is loaded."""
    given = vllm_config.cache_config.kv_cache_memory_bytes
    if given is not None:
        return given
    device = current_platform.get_device_total_memory() * vllm_config.cache_config.gpu_memory_utilization
    with torch.device("meta"):
        model = LactForCausalLM(vllm_config.model_config.hf_config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    item, ranks = vllm_config.model_config.dtype.itemsize, vllm_config.parallel_config.tensor_parallel_size
    return max(int(device) - numbers * item // ranks, 0)


def register_with_vllm() -> None:
    """Make the model known to vLLM."""
    ModelRegistry.register_model(ARCHITECTURE, f"kvbind.serving.model:Served{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedConfig
    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, "kvbind.serving.cache.FastWeightsBackend", is_mamba=True)
