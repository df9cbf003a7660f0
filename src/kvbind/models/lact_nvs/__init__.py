"""LaCT view synthesis (arXiv 2505.23884): posed images are compressed into fast weights, and rendered from new cameras."""

from kvbind.models.lact_nvs.cameras import SceneFrame, invert_pose, mean_frame, normalize_cameras, project, ray_maps, rays
from kvbind.models.lact_nvs.config import INNER_LOOPS, PRESETS, LactNvsConfig
from kvbind.models.lact_nvs.model import LactNvs, from_released_config
from kvbind.models.lact_nvs.scene import Scene

__all__ = [
    "INNER_LOOPS",
    "PRESETS",
    "LactNvs",
    "LactNvsConfig",
    "Scene",
    "SceneFrame",
    "from_released_config",
    "invert_pose",
    "mean_frame",
    "normalize_cameras",
    "project",
    "ray_maps",
    "rays",
]
