"""In-Place TTT (arXiv 2604.06169) for any decoder of transformers, registered with its Auto classes as "in_place_ttt"."""

# ruff: noqa: E402
from kvbind.models.lact.supported import check_transformers

# first, as what follows may not exist in another transformers
check_transformers()

from transformers import AutoConfig, AutoModelForCausalLM

from kvbind.models.in_place.cache import InPlaceCache
from kvbind.models.in_place.config import InPlaceConfig
from kvbind.models.in_place.folders import in_place
from kvbind.models.in_place.model import InPlaceForCausalLM

AutoConfig.register(InPlaceConfig.model_type, InPlaceConfig)
AutoModelForCausalLM.register(InPlaceConfig, InPlaceForCausalLM)

__all__ = ["InPlaceCache", "InPlaceConfig", "InPlaceForCausalLM", "in_place"]
