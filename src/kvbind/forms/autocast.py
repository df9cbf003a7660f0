"""Inner loops are computed outside autocast: their state is float32 or wider."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off for a type of device; where it is off already, nothing, which takes the host less than turning it off."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device, of which some, such as "meta", have none."""
    return device != "meta" and torch.is_autocast_enabled(device)
