"""Model FLOPs of a training step, for model FLOP utilization (MFU): one formula for each of the three families.

What is counted is the arithmetic that the definition needs, in matrix products and convolutions, two per multiply-add:
every product once forward and, in the backward pass, once for the gradient of each of its factors. Fast weights count by
`kvbind.forms.explained.costs.training_flops`, Newton-Schulz among them; window attention counts the pairs inside the window.
What an implementation computes again (checkpointed blocks, logits, attention scores, features) is not counted, nor is what
is elementwise. So recomputation lowers the utilization, and a faster form of the same inner loop raises it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from kvbind.forms.explained.costs import Shapes, training_flops
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_positive_int
from kvbind.layers.fast_weights.convolution import ShortConvolution
from kvbind.models.in_place.config import InPlaceConfig
from kvbind.models.lact.config import LactConfig
from kvbind.models.lact_nvs.config import LactNvsConfig
from kvbind.models.vittt.config import VitttConfig
from kvbind.models.vittt.stages import downsampling, stem

Parts = dict[str, float]
"""Model FLOPs by part of a model."""

TRAINED = 3
"""Products in training for each of the forward pass: itself, and one for the gradient of each factor."""


def window_pairs(length: int, window: int) -> int:
    """How many pairs of a query and a key causal attention over a sliding window has in one sequence.

    Args:
        length: tokens.
        window: how many tokens a token sees, itself among them.
    """
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * window


def lact_flops(config: LactConfig, length: int) -> Parts:
    """Training on one sequence with the LaCT language model.

    Per token and layer `2 d (4 d + rates and gates)` for the projections, `6 d` times the MLP's width, `4 d` for each pair
    inside the window, and the inner loop; `2 d` times the vocabulary at the end; all times 3. The low-rank start of the gate
    and up matrices counts once per sequence. Layers without attention count the matrices that they have.

    Args:
        config: of the model.
        length: tokens in the sequence, which is one document.

    Returns:
        Model FLOPs of the whole sequence under "projections", "mlp", "attention", "fast weights" and "vocabulary"; of layers
        without attention, or without fast weights, the others and "convolutions".

    Raises:
        TypeError, ValueError: `length` is no int of at least 1.
    """
    check_positive_int("length", length)
    d, heads, inner = config.hidden_size, config.num_lact_heads, config.inner
    width, value_width, hidden = config.fast_widths
    mlp, vocabulary = TRAINED * 6 * d * config.mlp_width * length, TRAINED * 2 * d * config.vocab_size * length
    if config.projections is not None:
        alone = {
            "projections": TRAINED * 2 * _projected(config, nn.Linear) * length,
            "convolutions": TRAINED * 2 * _projected(config, ShortConvolution) * length,
            "mlp": mlp,
            "fast weights": training_flops(inner, Shapes(heads, width, value_width, hidden, length)),
        }
        return {name: config.num_hidden_layers * value for name, value in alone.items()} | {"vocabulary": vocabulary}
    attention = TRAINED * 4 * d * window_pairs(length, config.window_size)
    if not config.fast_weights:
        alone = {"projections": TRAINED * 2 * d * 4 * d * length, "mlp": mlp, "attention": attention}
        return {name: config.num_hidden_layers * value for name, value in alone.items()} | {"vocabulary": vocabulary}
    rates = sum(name in inner.network.matrices for name in inner.updated) * inner.token_lr
    made = sum(width if gate.per == "key" else 1 for gate in inner.gates.values())
    gates = heads * (rates + made + config.learnable_ttt_scale)
    fast = training_flops(inner, Shapes(heads, width, width, hidden, length))
    if config.w0_w2_low_rank > 0:
        shapes = inner.network.shapes(width, width, (hidden,) * inner.network.hidden_layers)
        entries = sum(rows * columns for name, (rows, columns) in shapes.items() if name in ("gate", "up"))
        fast += TRAINED * 2 * heads * entries * config.w0_w2_low_rank
    per_layer = {
        "projections": TRAINED * 2 * d * (4 * d + gates) * length,
        "mlp": mlp,
        "attention": attention,
        "fast weights": fast,
    }
    parts = {name: config.num_hidden_layers * value for name, value in per_layer.items()}
    return {**parts, "vocabulary": vocabulary}


def llama_flops(config: PretrainedConfig, length: int) -> Parts:
    """Training on one sequence with a Llama, or a model like it, whose keys have as many heads as its queries.

    Args:
        config: of the model.
        length: tokens in the sequence, which is one document.

    Returns:
        Model FLOPs of the whole sequence under "projections", "mlp", "attention" and "vocabulary".

    Raises:
        TypeError, ValueError: `length` is no int of at least 1.
    """
    check_positive_int("length", length)
    d, layers = config.hidden_size, config.num_hidden_layers
    return {
        "projections": layers * TRAINED * 8 * d * d * length,
        "mlp": layers * TRAINED * 6 * d * config.intermediate_size * length,
        "attention": layers * TRAINED * 4 * d * window_pairs(length, length),
        "vocabulary": TRAINED * 2 * d * config.vocab_size * length,
    }


def in_place_flops(config: InPlaceConfig, length: int) -> Parts:
    """Training on one sequence with such a Llama whose chosen MLPs are fast weights.

    Per token and fast MLP, what is written takes `2 d` times the MLP's width, and what makes its value `2 d` times the
    convolution's width and, for the projection, `2 d^2`; all times 3. Features are those that the MLP has anyway.

    Args:
        config: of the model.
        length: tokens in the sequence, which is one document.

    Returns:
        As `llama_flops`, and "fast weights".
    """
    inside = config.text_config
    d = inside.hidden_size
    written = inside.intermediate_size + config.conv_width + d * config.projection
    return llama_flops(inside, length) | {"fast weights": len(config.fast_layers) * TRAINED * 2 * d * written * length}


def _projected(config: LactConfig, kind: type[nn.Module]) -> int:
    """Entries of the matrices, or of the kernels, by which a layer without attention makes what a token takes."""
    from kvbind.models.lact.blocks import make_mixer

    with torch.device("meta"):
        layer = make_mixer(config)
    found = [module.weight for module in layer.modules() if isinstance(module, kind)]
    return sum(weight.numel() for weight in found if isinstance(weight, torch.Tensor))


def lact_nvs_flops(config: LactNvsConfig, size: tuple[int, int], inputs: int, targets: int) -> Parts:
    """Training on one scene with LaCT view synthesis.

    Attention is among the tokens of each image. Input views write the fast weights, all views read them. The first layer
    needs no gradient of its input.

    Args:
        config: of the model.
        size: height and width of the images in pixels.
        inputs: views that are read.
        targets: views that are rendered.

    Returns:
        Model FLOPs of the scene under "projections", "mlp", "attention", "fast weights" and "pixels". Baselines without
        fast weights have the others.

    Raises:
        TypeError, ValueError: views that are no ints of at least 1, or a size that the patches do not tile.
    """
    check_positive_int("inputs", inputs)
    check_positive_int("targets", targets)
    d, patch = config.dim, config.patch_size
    if size[0] % patch or size[1] % patch:
        raise ValueError(f"size must be multiples of the patches' side, {patch}; got {size[0]} x {size[1]}")
    per_image = size[0] // patch * (size[1] // patch)
    written, tokens = inputs * per_image, (inputs + targets) * per_image
    inner, heads, width = config.inner, d // config.fast_head_dim, config.fast_head_dim
    rates = heads * len(inner.updated) * inner.token_lr * config.fast_weights
    shapes = Shapes(heads, width, width, int(width * config.inter_multi), tokens)
    # of a baseline, every token attends to those that are read
    across = {"fast weights": training_flops(inner, shapes, written)} if config.fast_weights else {}
    seen = per_image if config.fast_weights else per_image + written
    per_layer = {
        # of attention and of fast weights: q, k, v and the output each
        "projections": TRAINED * 2 * d * (8 * d + rates) * tokens,
        "mlp": TRAINED * 4 * d * int(d * config.mlp_ratio) * tokens,
        "attention": TRAINED * 4 * d * seen * tokens,
        **across,
    }
    parts = {name: config.layers * value for name, value in per_layer.items()}
    read, rendered = 2 * 12 * patch**2 * d * tokens, 2 * 3 * patch**2 * d * targets * per_image
    return {**parts, "pixels": (TRAINED - 1) * read + TRAINED * rendered}


def vittt_flops(config: VitttConfig, size: tuple[int, int]) -> Parts:
    """Training on one image with ViTTT, plain or hierarchical.

    Args:
        config: of the model.
        size: height and width of the image in pixels.

    Returns:
        Model FLOPs of the image under "projections", "mlp", "convolutions", "fast weights" and "pixels" (the stem or patch
        embedding, downsampling and the classifier). The first convolution needs no gradient of its input.

    Raises:
        ValueError: a size that the patches of the plain model do not tile.
    """
    grid = (size[0], size[1])
    if isinstance(config.embed_dim, int):
        patch = (config.patch_size,) * 2 if isinstance(config.patch_size, int) else tuple(config.patch_size)
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(f"size must be multiples of the patch's, {patch[0]} x {patch[1]}; got {size[0]} x {size[1]}")
        grid = (size[0] // patch[0], size[1] // patch[1])
        embedding = 2 * config.in_chans * patch[0] * patch[1] * config.embed_dim * grid[0] * grid[1]
        parts = _vittt_blocks(config, config.embed_dim, config.depth, config.num_heads, grid)  # type: ignore[arg-type]
        ends, last = (TRAINED - 1.0) * embedding, config.embed_dim
    else:
        parts, ends, last = dict.fromkeys(("projections", "mlp", "convolutions", "fast weights"), 0.0), 0.0, 0
        stages: Sequence[tuple[int, int, int]] = list(zip(config.embed_dim, config.depth, config.num_heads, strict=True))  # type: ignore[arg-type]
        with torch.device("meta"):
            between = [stem(config.in_chans, stages[0][0])]
            between += [downsampling(old[0], new[0]) for old, new in itertools.pairwise(stages)]
        for number, ((dim, depth, heads), convolutions) in enumerate(zip(stages, between, strict=True)):
            forward, first, grid = _convolution_flops(convolutions, grid)
            ends += TRAINED * forward - (first if number == 0 else 0)
            stage = _vittt_blocks(config, dim, depth, heads, grid)
            parts, last = {name: value + stage[name] for name, value in parts.items()}, dim
    return {**parts, "pixels": ends + TRAINED * 2 * last * (config.num_labels or 0)}


def _vittt_blocks(config: VitttConfig, dim: int, depth: int, heads: int, grid: tuple[int, int]) -> Parts:
    """The blocks at one resolution; those of the hierarchical model have a convolution in the MLP."""
    tokens, width, hidden = grid[0] * grid[1], dim // heads, int(dim * config.mlp_ratio)

    if not config.fast_weights:
        plain = {
            "projections": TRAINED * 2 * 4 * dim * dim * tokens,
            "mlp": TRAINED * 4 * dim * hidden * tokens,
            "attention": TRAINED * 4 * dim * tokens * tokens,
        }
        return {name: depth * value for name, value in plain.items()}

    def fast(inner: InnerLoop, of_heads: int) -> float:
        return training_flops(inner, Shapes(of_heads, width, width, width, tokens))

    per_layer = {
        "projections": TRAINED * 2 * (3 * dim * (dim + width) + (dim + width) * dim) * tokens,
        "mlp": TRAINED * 4 * dim * hidden * tokens,
        "convolutions": TRAINED * 2 * 9 * (dim + hidden * config.hierarchical) * tokens,
        "fast weights": fast(config.inner, heads) + fast(config.inner_conv, 1),
    }
    return {name: depth * value for name, value in per_layer.items()}


def _convolution_flops(convolutions: nn.Module, grid: tuple[int, int]) -> tuple[float, float, tuple[int, int]]:
    """Forward FLOPs of convolutions in a row, of the first alone, and the grid behind them."""
    each = []
    for layer in convolutions.modules():
        if isinstance(layer, nn.Conv2d):
            stride = layer.stride
            grid = (-(-grid[0] // stride[0]), -(-grid[1] // stride[1]))
            each.append(2.0 * layer.weight.numel() * grid[0] * grid[1])
    return sum(each), each[0], grid
