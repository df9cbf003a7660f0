"""Accelerators by name: what their datasheets say."""

from __future__ import annotations

from dataclasses import dataclass

from kvbind.inner.value import nearest


@dataclass(frozen=True)
class Accelerator:
    """A GPU as it stands in a node of its maker's design.

    Attributes:
        title: its name in full.
        flops: of dense matrix products in bfloat16, floating-point operations per second.
        memory: bytes.
        memory_bandwidth: bytes per second.
        link: bytes per second to the other GPUs of its node, in one direction.
        network: bytes per second to other nodes, in one direction: its share of the node's network cards.
        node: GPUs in a node.
        source: the datasheets.
    """

    title: str
    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    node: int
    source: str


ACCELERATORS: dict[str, Accelerator] = {
    "h100": Accelerator(
        "NVIDIA H100 80GB",
        989e12,
        80e9,
        3.35e12,
        450e9,
        50e9,
        8,
        "H100 Tensor Core GPU datasheet (SXM5); DGX H100 datasheet",
    ),
    "h200": Accelerator(
        "NVIDIA H200 141GB",
        989e12,
        141e9,
        4.8e12,
        450e9,
        50e9,
        8,
        "H200 Tensor Core GPU datasheet (SXM5); DGX H200 datasheet",
    ),
    "a100": Accelerator(
        "NVIDIA A100 80GB",
        312e12,
        80e9,
        2.039e12,
        300e9,
        25e9,
        8,
        "A100 Tensor Core GPU datasheet (SXM4); DGX A100 datasheet",
    ),
    "a100-40gb": Accelerator(
        "NVIDIA A100 40GB",
        312e12,
        40e9,
        1.555e12,
        300e9,
        25e9,
        8,
        "A100 Tensor Core GPU datasheet (SXM4); DGX A100 datasheet",
    ),
}
"""By name. Products are those without sparsity (half of what datasheets print first), links one direction of two."""


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    if name not in ACCELERATORS:
        raise ValueError(f"hardware must be one of {', '.join(ACCELERATORS)}; got {name!r}{nearest(name, ACCELERATORS)}")
    return ACCELERATORS[name]


def peak_flops(device: str) -> float | None:
    """Operations per second of dense bfloat16 products on what PyTorch calls `device`, or None where that is not known."""
    name = recognized(device)
    return ACCELERATORS[name].flops if name else None


def recognized(device: str) -> str | None:
    """The name of the accelerator that PyTorch calls `device` ("NVIDIA H100 80GB HBM3"), or None."""
    words = device.lower()
    if "a100" in words and "40gb" in words:
        return "a100-40gb"
    return next((name for name in ("h100", "h200", "a100") if name in words), None)
