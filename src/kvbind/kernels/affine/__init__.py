"""The delta rule and its kin: `operator` calls the kernels of the other modules."""

from kvbind.kernels.affine.operator import affine_chunks

__all__ = ["affine_chunks"]
