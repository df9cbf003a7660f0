"""Pictures of what a trained model sees: a sheet of held-out views, and a camera moving around scenes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kvbind.inner.value import check_positive_int
from kvbind.models.lact_nvs import LactNvs
from kvbind.tasks.views.drawing import Batch, evaluation_batches
from kvbind.tasks.views.metrics import psnr
from kvbind.tasks.views.orbit import orbit
from kvbind.tasks.views.task import ViewsTask, predict

ERROR_SCALE = 3
"""By how much the sheet's errors are brightened."""

SHOWN_INPUTS = 4
LEAST_SIDE = 128
GAP, LINE = 4, 18


def write_pictures(
    model: LactNvs, task: ViewsTask, folder: Path, *, scenes: int = 4, frames: int = 48, per_second: int = 16
) -> list[Path]:
    """Render held-out scenes of a task.

    Args:
        model: trained, on any device.
        task: whose held-out scenes are shown.
        folder: where to; made if need be.
        scenes: how many, the first of those that are evaluated on.
        frames: of the turntable.
        per_second: frames of the turntable in a second.

    Returns:
        The files: `sheet.png`, `turntable.gif`, and `turntable.mp4` where `imageio-ffmpeg` is installed.
    """
    for name, value in {"scenes": scenes, "frames": frames, "per_second": per_second}.items():
        check_positive_int(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    shown = first_scenes(task, scenes)
    sheet(model, task, shown).save(folder / "sheet.png")
    moving = turntable(model, task, shown, frames)
    write_gif(folder / "turntable.gif", moving, per_second)
    written = [folder / "sheet.png", folder / "turntable.gif"]
    if find_spec("imageio_ffmpeg"):
        write_mp4(folder / "turntable.mp4", moving, per_second)
        written.append(folder / "turntable.mp4")
    return written


def first_scenes(task: ViewsTask, scenes: int) -> Batch:
    """The first held-out scenes that the task is evaluated on, as one batch."""
    batches: list[Batch] = []
    for batch in evaluation_batches(task.held_out, task.config.data):
        batches.append(batch)
        if sum(len(one["c2w"]) for one in batches) >= scenes:
            break
    return {name: torch.cat([one[name] for one in batches])[:scenes] for name in batches[0] if name != "number"}


@torch.no_grad()
def sheet(model: LactNvs, task: ViewsTask, batch: Batch) -> Image.Image:
    """A table of pictures, a scene per row: some inputs, a target, its prediction with PSNR, and the error.

    Args:
        model: on any device.
        task: whose scenes they are.
        batch: of scenes.
    """
    inputs, true, there = _pixels(model, task, batch)
    predicted = predict(model, inputs, there)
    decibels = psnr(predicted[:, 0], true[:, 0]).tolist()
    count = min(SHOWN_INPUTS, inputs.shape[1])
    error = (ERROR_SCALE * (predicted[:, :1] - true[:, :1]).abs().mean(2, keepdim=True)).expand_as(true[:, :1])
    columns = torch.cat((inputs[:, :count], true[:, :1], predicted[:, :1], error), dim=1)
    titles = [*(["input"] * count), "target", "prediction", f"error x {ERROR_SCALE}"]
    cells = [[upscaled(as_picture(x)) for x in row] for row in columns]
    wide, high = cells[0][0].size
    page = Image.new("RGB", (len(titles) * (wide + GAP) + GAP, LINE + len(cells) * (high + LINE)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        draw.text((GAP + i * (wide + GAP), 2), title, fill="black", font=font)
    for j, row in enumerate(cells):
        top = LINE + j * (high + LINE)
        for i, cell in enumerate(row):
            page.paste(cell, (GAP + i * (wide + GAP), top))
        at = GAP + titles.index("prediction") * (wide + GAP)
        draw.text((at, top + high + 1), f"{decibels[j]:.2f} dB", fill="black", font=font)
    return page


@torch.no_grad()
def turntable(model: LactNvs, task: ViewsTask, batch: Batch, frames: int) -> list[Image.Image]:
    """Scenes side by side, from a camera that moves around each (`kvbind.tasks.views.orbit`).

    Args:
        model: on any device.
        task: whose scenes they are.
        batch: of scenes, each of which is read once.
        frames: how many.
    """
    inputs, _, there = _pixels(model, task, batch)
    scene = model.reconstruct(inputs, there["c2w"], there["fxfycxcy"])
    path = torch.stack([orbit(poses.cpu(), frames) for poses in batch["c2w"]]).to(inputs.device)
    intrinsics = there["fxfycxcy"][:, :1].expand(-1, frames, -1)
    rendered = model.render(scene, path, intrinsics).float()
    pictures = []
    for views in rendered.unbind(1):
        cells = [upscaled(as_picture(view)) for view in views]
        wide, high = cells[0].size
        page = Image.new("RGB", (len(cells) * (wide + GAP) - GAP, high), "white")
        for i, cell in enumerate(cells):
            page.paste(cell, (i * (wide + GAP), 0))
        pictures.append(page)
    return pictures


def as_picture(image: Tensor) -> Image.Image:
    """RGB `[3, h, w]` in [0, 1] as a picture."""
    values: NDArray[np.uint8] = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(values)


def upscaled(picture: Image.Image) -> Image.Image:
    """A picture whose pixels are repeated until it can be seen on a screen."""
    times = -(-LEAST_SIDE // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def write_gif(path: Path, frames: Sequence[Image.Image], per_second: int) -> None:
    """Frames as an endless GIF."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / per_second), loop=0)


def write_mp4(path: Path, frames: Sequence[Image.Image], per_second: int) -> None:
    """Frames as a video, through `imageio-ffmpeg`."""
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, fps=per_second, macro_block_size=2)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _pixels(model: LactNvs, task: ViewsTask, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
    """Inputs and targets of a batch, RGB in [0, 1], and the batch, all on the model's device."""
    device = next(model.parameters()).device
    there: Batch = {name: x.to(device) for name, x in batch.items()}
    inputs, true = (task.held_out.pixels(there[name], device) for name in ("image", "target_image"))
    return inputs, true, there
