"""The LaCT language model (arXiv 2505.23884), registered with transformers' Auto classes as "lact_swiglu"."""

# ruff: noqa: E402
from kvbind.models.lact.supported import check_transformers

# first, as what follows may not exist in another transformers
check_transformers()

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvbind.models.lact.cache import LactCache
from kvbind.models.lact.config import LactConfig
from kvbind.models.lact.model import LactForCausalLM, LactModel

AutoConfig.register(LactConfig.model_type, LactConfig)
AutoModel.register(LactConfig, LactModel)
AutoModelForCausalLM.register(LactConfig, LactForCausalLM)

__all__ = ["LactCache", "LactConfig", "LactForCausalLM", "LactModel"]
