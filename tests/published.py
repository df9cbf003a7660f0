"""Named systems that have a layer of their own, with short spans."""

import torch

from kvbind import NewtonSchulz, systems

SPAN = 4
"""Tokens between renewals of the weights that gradients are taken at, where a system has any."""

SYSTEMS = {name: systems.named(name) for name in systems.PROJECTIONS}
SYSTEMS |= {name: SYSTEMS[name].replace(refresh=SPAN) for name in ("ttt_linear", "ttt_mlp", "titans", "atlas")}
SYSTEMS["atlas"] = SYSTEMS["atlas"].replace(orthogonalize=NewtonSchulz(dtype=torch.float64), window=2)
