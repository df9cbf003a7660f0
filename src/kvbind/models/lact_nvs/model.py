"""LaCT view synthesis: posed images in, images of new cameras out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvbind.files import inside, read_fields, read_tensors
from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_positive_int
from kvbind.kernels.common.tracing import has_values
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.plain_modules import input_dtype, matrix_of, own_weights
from kvbind.models.lact_nvs.blocks import LactNvsBlock
from kvbind.models.lact_nvs.cameras import check_intrinsics, check_poses, ray_maps
from kvbind.models.lact_nvs.config import LactNvsConfig
from kvbind.models.lact_nvs.scene import Scene
from kvbind.models.loading import configured, load_into
from kvbind.models.recompute import check_recomputing

INIT_STD = 0.02
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, ASSIGNED = "lact_nvs", "assigned_inner"
MARK_LENGTH = 4096
MARK_TOLERANCE = 0.02
"""How far the marks of one model may differ: rounding its weights to bfloat16 moves them by about a tenth of this."""

Images = Tensor | Sequence[Tensor]


class LactNvs(nn.Module):
    """LaCT view synthesis (specification, section 5; arXiv 2505.23884).

    Views become tokens: per pixel the ray's origin, direction and moment, and RGB in [-1, 1] (zeros for targets). Input
    views write the fast weights of each layer, all views read them, and the tokens of the targets become pixels. Targets
    write nothing: a scene is compressed once (`reconstruct`) and rendered from any number of cameras (`render`), with the
    pixels that `forward` gives. Images of any size, square or not, that the patches tile.

    Cameras are explained in `kvbind.models.lact_nvs.cameras`. Their values are checked on the CPU always, and elsewhere
    outside training, in which reading them would stall each step.

    Parameters have the released names and layouts (specification, section 6), so that released checkpoints load.

    Args:
        config: the sizes, and the inner loop of every layer.

    Attributes:
        config: as given.

    Raises:
        TypeError: `config` is no LactNvsConfig.
    """

    def __init__(self, config: LactNvsConfig) -> None:
        super().__init__()
        if not isinstance(config, LactNvsConfig):
            raise TypeError(f"config must be a LactNvsConfig (see PRESETS); got {type(config).__name__}")
        self.config = config
        pixels = config.patch_size**2
        self.input_linear = nn.Linear(12 * pixels, config.dim, bias=False)
        self.input_layernorm = nn.LayerNorm(config.dim, bias=False)
        self.blocks = nn.ModuleList(LactNvsBlock(config) for _ in range(config.layers))
        self.image_token_decoder = nn.Sequential(
            nn.LayerNorm(config.dim, bias=False), nn.Linear(config.dim, 3 * pixels, bias=False), nn.Sigmoid()
        )
        self.gradient_checkpointing = False
        self.reset_parameters()

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """A model with random weights, built as a released configuration says.

        Args:
            fields: the content of the released YAML file, as `LactNvsConfig.from_released_config` takes it.

        Raises:
            ValueError: a field that is missing or has another value than released models have.
        """
        return cls(LactNvsConfig.from_released_config(fields))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: what `save_pretrained` wrote.
            device: where to put its parameters.

        Raises:
            ValueError: a folder that holds no such model, or a damaged one; the message names the file.
            OSError: a file that cannot be read.
        """
        home = Path(folder)
        fields = read_fields(inside(home, CONFIG)) if (home / CONFIG).is_file() else {}
        if fields.get("model_type") != MODEL_TYPE or not (home / WEIGHTS).is_file():
            raise ValueError(f"folder must be one that LactNvs.save_pretrained wrote; got {str(folder)!r}")
        weights, _ = read_tensors(inside(home, WEIGHTS), device)
        with configured(home, "LaCT view synthesis model", fields, weights):
            model = cls.from_saved_config(fields)
        load_into(model, weights, home)
        return model.eval()

    @classmethod
    def from_saved_config(cls, fields: dict[str, Any]) -> Self:
        """A model without weights, on the meta device, built as the `config.json` of `save_pretrained` says.

        Args:
            fields: the content of that file.

        Raises:
            TypeError, ValueError: as `LactNvsConfig.from_dict`.
        """
        sizes = {name: value for name, value in fields.items() if name not in ("model_type", ASSIGNED)}
        with torch.device("meta"):
            model = cls(LactNvsConfig.from_dict(sizes))
        if ASSIGNED in fields:
            model.inner = InnerLoop.from_dict(fields[ASSIGNED])
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration, the inner loop where another was assigned since, and the parameters.

        Args:
            folder: where to; made if need be. It will hold `config.json` and `model.safetensors`.

        Raises:
            ValueError: layers with different inner loops, which one configuration cannot describe.
        """
        if any(mixer.inner != self.inner for mixer in self.mixers):
            raise ValueError("a model must have one inner loop in all layers to be saved; those of this one differ")
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        fields = {"model_type": MODEL_TYPE} | self.config.to_dict()
        if self.inner != self.config.inner:
            fields[ASSIGNED] = self.inner.to_dict()
        (home / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file({name: x.detach().contiguous() for name, x in self.state_dict().items()}, str(home / WEIGHTS))

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        residual = INIT_STD / math.sqrt(3 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith("c_proj") else INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm | LactNvsLayer):
                module.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass in place of keeping its activations."""
        self.gradient_checkpointing = enable

    @property
    def mixers(self) -> tuple[LactNvsLayer, ...]:
        """The fast-weight layers, first to last; of a baseline none."""
        return tuple(block.fast for block in self.blocks if self.config.fast_weights)  # type: ignore[misc]

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of the first layer; assigning one gives it to every layer.

        Of a baseline, what its configuration has, which is without meaning.
        """
        return self.mixers[0].inner if self.mixers else self.config.inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        for mixer in self.mixers:
            mixer.inner = inner

    def forward(self, image: Images, c2w: Tensor, fxfycxcy: Tensor, target_c2w: Tensor, target_fxfycxcy: Tensor) -> Tensor:
        """Render target cameras from input views in one pass.

        Args:
            image: input views `[B, V, 3, h, w]`, RGB in [0, 1], floating-point; or a list of B tensors `[V, 3, h, w]`.
            c2w: their poses `[B, V, 4, 4]`, camera to world.
            fxfycxcy: their intrinsics `[B, V, 4]` in pixels.
            target_c2w: poses to render `[B, Vt, 4, 4]`.
            target_fxfycxcy: their intrinsics `[B, Vt, 4]`, in pixels of images of the input's size.

        Returns:
            Images `[B, Vt, 3, h, w]`, RGB in [0, 1].

        Raises:
            TypeError, ValueError: an argument that does not fit; the message names it.
        """
        image = self._check_views(image, c2w, fxfycxcy)
        self._check_cameras("target_", target_c2w, target_fxfycxcy, image.shape[0], image.device)
        size = (image.shape[-2], image.shape[-1])
        inputs = self._tokens(c2w, fxfycxcy, size, image)
        targets = self._tokens(target_c2w, target_fxfycxcy, size, None)
        written = inputs.shape[1]
        x, _ = self._run(torch.cat((inputs, targets), dim=1), size, slice(0, written), None)
        return self._pixels(x[:, written:], size)

    def reconstruct(self, image: Images, c2w: Tensor, fxfycxcy: Tensor, scene: Scene | None = None) -> Scene:
        """Read input views into a scene.

        Views that are added to a scene make one more update of the fast weights that it holds. That is not the same as one
        update from all views together: each update has the same size, whatever the number of its views.

        Args:
            image: input views `[B, V, 3, h, w]`, RGB in [0, 1], floating-point; or a list of B tensors `[V, 3, h, w]`.
            c2w: their poses `[B, V, 4, 4]`, camera to world.
            fxfycxcy: their intrinsics `[B, V, 4]` in pixels.
            scene: a scene of this model to add the views to; it stays as it is.

        Returns:
            The scene, attached to the autograd graph where there is one.

        Raises:
            TypeError, ValueError: an argument that does not fit, or a scene of another model; the message names it. A model
                without fast weights.
        """
        if not self.config.fast_weights:
            raise ValueError(
                "config must have fast_weights=True for scenes to be reconstructed: a baseline has forward alone"
            )
        image = self._check_views(image, c2w, fxfycxcy)
        size = (image.shape[-2], image.shape[-1])
        states: Sequence[State | None] | None = None
        if scene is not None:
            self._check_scene(scene, image.shape[0], image.device)
            if scene.size != size:
                raise ValueError(
                    f"image must be of the scene's size, {scene.size[0]} x {scene.size[1]}; got {size[0]} x {size[1]}"
                )
            states = scene.states
        _, after = self._run(self._tokens(c2w, fxfycxcy, size, image), size, None, states)
        views = image.shape[1] + (0 if scene is None else scene.views)
        return Scene(tuple(after), size, views, self._architecture(), self._mark())

    def render(
        self,
        scene: Scene,
        c2w: Tensor,
        fxfycxcy: Tensor,
        size: tuple[int, int] | None = None,
        views_at_once: int = 16,
    ) -> Tensor:
        """Images of a scene from any cameras, the same that `forward` gives.

        Args:
            scene: what `reconstruct` returned.
            c2w: poses `[B, Vt, 4, 4]`, camera to world, in the coordinates of the scene's views.
            fxfycxcy: intrinsics `[B, Vt, 4]`, in pixels of the images to render.
            size: their height and width in pixels; by default those of the scene's views.
            views_at_once: how many of the Vt cameras to render in one pass, which bounds memory and changes nothing else.

        Returns:
            Images `[B, Vt, 3, h, w]`, RGB in [0, 1].

        Raises:
            TypeError, ValueError: an argument that does not fit, or a scene of another model; the message names it.
        """
        self._check_scene(scene, None, None)
        check_positive_int("views_at_once", views_at_once)
        size = scene.size if size is None else (size[0], size[1])
        self._check_size("size", size)
        self._check_cameras("", c2w, fxfycxcy, scene.batch, scene.device)
        pictures = []
        for poses, intrinsics in zip(
            torch.split(c2w, views_at_once, 1), torch.split(fxfycxcy, views_at_once, 1), strict=True
        ):
            x, _ = self._run(self._tokens(poses, intrinsics, size, None), size, slice(0, 0), scene.states)
            pictures.append(self._pixels(x, size))
        return torch.cat(pictures, dim=1)

    def _tokens(self, c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int], image: Tensor | None) -> Tensor:
        """First tokens `[B, V * T, d]` of views; without images, of targets."""
        maps = ray_maps(c2w, fxfycxcy, size)
        colour = torch.zeros_like(maps[:, :, :3]) if image is None else image.to(maps.dtype) * 2 - 1
        patches = self._cut(torch.cat((maps, colour), dim=2))
        dtype = input_dtype(self.input_linear, self.input_layernorm.weight.dtype)
        tokens: Tensor = self.input_layernorm(self.input_linear(patches.to(dtype)))
        return tokens

    def _cut(self, maps: Tensor) -> Tensor:
        """`[B, V, C, h, w]` to patches `[B, V * T, p * p * C]`, each flattened by row, column, channel."""
        p = self.config.patch_size
        batch, views, channels, height, width = maps.shape
        grid = maps.reshape(batch, views, channels, height // p, p, width // p, p)
        return grid.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)

    def _pixels(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Last tokens `[B, V * T, d]` as images `[B, V, 3, h, w]`."""
        p = self.config.patch_size
        colours: Tensor = self.image_token_decoder(x)
        grid = colours.reshape(x.shape[0], -1, size[0] // p, size[1] // p, p, p, 3)
        return grid.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _run(
        self,
        x: Tensor,
        size: tuple[int, int],
        update_tokens: slice | None,
        states: Sequence[State | None] | None,
    ) -> tuple[Tensor, list[State]]:
        """All blocks: tokens `[B, V * T, d]` and each layer's state."""
        per_image = size[0] * size[1] // self.config.patch_size**2
        recomputed = self.gradient_checkpointing and self.training
        if recomputed:
            check_recomputing()
        after = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            if recomputed:
                x, new = checkpoint(block, x, per_image, update_tokens, state, use_reentrant=False)
            else:
                x, new = block(x, per_image, update_tokens, state)
            after.append(new)
        return x, after

    def _architecture(self) -> dict[str, Any]:
        """The sizes that a scene depends on; each layer's inner loop is in its state."""
        fields = self.config.to_dict()
        del fields["inner"], fields["fast_weights"]  # there is no scene without
        return fields

    @torch.no_grad()
    def _mark(self) -> Tensor:
        """Numbers that tell this model's weights from others', `[layers, matrices]`, float32 on the CPU."""
        rows = []
        for mixer in self.mixers:
            with own_weights(mixer):
                linear = (matrix_of(layer, self.config.dim) for layer in (mixer.to_qkv, mixer.c_proj))
                parts = [w.detach().flatten()[:MARK_LENGTH].float() for w in (*linear, *mixer.start_weights().values())]
            waves = [torch.cos(torch.arange(len(part), device=part.device, dtype=torch.float32)) for part in parts]
            rows.append(torch.stack([part @ wave / part.norm() for part, wave in zip(parts, waves, strict=True)]))
        return torch.stack(rows).cpu()

    def _check_scene(self, scene: Scene, batch: int | None, device: torch.device | None) -> None:
        if not isinstance(scene, Scene):
            raise TypeError(f"scene must be what reconstruct returned (a Scene); got {type(scene).__name__}")
        own = self._architecture()
        for name, value in own.items():
            if scene.architecture.get(name) != value:
                raise ValueError(
                    f"scene must be one that this model reconstructed: it has {name} = {scene.architecture.get(name)!r}, "
                    f"this model {value!r}"
                )
        for i, (mixer, state) in enumerate(zip(self.mixers, scene.states, strict=True)):
            if mixer.inner != state.spec:
                fields = mixer.inner.differing(state.spec)
                raise ValueError(
                    f"scene must be one that this model reconstructed: the inner loop of layer {i} differs in "
                    f"{', '.join(fields)}"
                )
        mark = self._mark()
        if mark.shape != scene.mark.shape or bool(((mark - scene.mark).abs() > MARK_TOLERANCE).any()):
            raise ValueError("scene must be one that this model reconstructed: this model has other weights")
        if batch is not None and scene.batch != batch:
            raise ValueError(f"scene must be a batch of {batch}, as image is; got {scene.batch}")
        if device is not None and scene.device != device:
            raise ValueError(f"scene must be on image's device, {device}; got {scene.device} (scene.to(device) moves it)")

    def _check_views(self, image: Images, c2w: Tensor, fxfycxcy: Tensor) -> Tensor:
        if isinstance(image, list | tuple):
            shapes = [list(one.shape) for one in image]
            if not shapes or any(shape != shapes[0] for shape in shapes):
                raise ValueError(f"image must hold views of one size, equally many in each scene; got shapes {shapes}")
            image = torch.stack(tuple(image))
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a tensor [B, V, 3, h, w]; got {type(image).__name__}")
        if image.dim() != 5 or image.shape[2] != 3:
            raise ValueError(f"image must be [B, V, 3, h, w]; got shape {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"image must be floating-point, RGB in [0, 1]; got {image.dtype}")
        if not image.shape[0] or not image.shape[1]:
            raise ValueError(f"image must have at least one scene and one view; got shape {list(image.shape)}")
        self._check_size("image", (image.shape[-2], image.shape[-1]))
        if self._looks_at_values(image):
            low, high = image.detach().aminmax()
            # resampling may overshoot a little
            if not (low >= -0.5 and high <= 1.5):
                raise ValueError(f"image must be RGB in [0, 1]; got values from {low:.4g} to {high:.4g}")
        self._check_cameras("", c2w, fxfycxcy, image.shape[0], image.device, image.shape[1])
        return image

    def _check_size(self, argument: str, size: tuple[int, int]) -> None:
        patch = self.config.patch_size
        if size[0] % patch or size[1] % patch or not size[0] or not size[1]:
            raise ValueError(
                f"{argument}'s height and width must be multiples of the patches' side, {patch}; got {size[0]} x {size[1]}"
            )

    def _check_cameras(
        self,
        prefix: str,
        c2w: Tensor,
        fxfycxcy: Tensor,
        batch: int,
        device: torch.device,
        views: int | None = None,
    ) -> None:
        poses, intrinsics = f"{prefix}c2w", f"{prefix}fxfycxcy"
        check_poses(poses, c2w, self._looks_at_values(c2w))
        check_intrinsics(intrinsics, fxfycxcy, self._looks_at_values(fxfycxcy))
        wanted = (batch, c2w.shape[1] if views is None else views)
        if not wanted[1]:
            raise ValueError(f"{poses} must have at least one camera; got shape {list(c2w.shape)}")
        for name, x in ((poses, c2w), (intrinsics, fxfycxcy)):
            last = list(x.shape[2:])
            if x.dim() != (4 if x is c2w else 3) or tuple(x.shape[:2]) != wanted:
                raise ValueError(f"{name} must be {[*wanted, *last]}, one camera for each view; got shape {list(x.shape)}")
            if x.device != device:
                raise ValueError(f"{name} must be on {device}, as the rest; got {x.device}")

    def _looks_at_values(self, x: object) -> bool:
        if not isinstance(x, Tensor) or not has_values(x):
            return False
        return x.device.type == "cpu" or not self.training


def from_released_config(fields: dict[str, Any]) -> LactNvs:
    """A model with random weights, built as a released configuration says; a released state dict loads into it by name.

    Args:
        fields: the content of the released YAML file: `patch_size`, `dim`, `layers`, `block_config`.

    Raises:
        ValueError: as `LactNvsConfig.from_released_config`.
    """
    return LactNvs.from_released_config(fields)
