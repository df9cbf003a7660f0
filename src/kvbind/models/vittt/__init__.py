"""ViTTT, the vision model with test-time training (arXiv 2512.01643): plain and hierarchical.

Importing this registers the models with timm, where timm is installed, and, as "vittt", with transformers' Auto classes.
"""

from contextlib import suppress

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from kvbind.models.ablations import IMAGES as RELEASED_LOSSES
from kvbind.models.vittt.config import VitttConfig, VitttForImageClassification
from kvbind.models.vittt.hierarchical import HierarchicalVittt
from kvbind.models.vittt.plain import Vittt
from kvbind.models.vittt.processing import VitttImageProcessor
from kvbind.models.vittt.released import INNER_LOOPS, SIZES, build, from_released_config
from kvbind.models.vittt.zoo import register

AutoConfig.register(VitttConfig.model_type, VitttConfig)
AutoModelForImageClassification.register(VitttConfig, VitttForImageClassification)
# one processor, with torchvision and without
with suppress(ImportError):
    # which some versions of transformers have with torchvision alone
    AutoImageProcessor.register(VitttConfig, image_processor_classes={"pil": VitttImageProcessor})
register()

__all__ = [
    "INNER_LOOPS",
    "RELEASED_LOSSES",
    "SIZES",
    "HierarchicalVittt",
    "Vittt",
    "VitttConfig",
    "VitttForImageClassification",
    "VitttImageProcessor",
    "build",
    "from_released_config",
]
