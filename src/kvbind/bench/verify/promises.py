"""`kvbind bench verify --what models`: what the documentation promises of the models, tried on a device.

Each case asks one thing: compiled calls and training steps are the uncompiled ones; `generate` gives what one forward pass
after another gives; Trainer learns in narrow precision; checkpointed blocks give the same gradients; a saved model is the
same model. Newton-Schulz runs in float32, as two ways of computing are compared and it magnifies rounding.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.bench.harness.device_time import first_line
from kvbind.bench.harness.kernel_switch import operators_of
from kvbind.bench.harness.process_pool import spread
from kvbind.bench.harness.record import OUT_OF_TIME, growing, provenance
from kvbind.bench.harness.timing import release
from kvbind.inner import systems
from kvbind.inner.spec import InnerLoop
from kvbind.precision import matmul_precision

SAME, SAME_GRADIENT = 1e-4, 1e-2
"""Bounds on relative differences in norm of losses or outputs, and of all gradients together, in float32."""

NARROW = 5e-2
"""Bound on the relative difference of a loss in bfloat16 or float16 from float32's."""

RULES = (
    "Relative differences in norm. In float32 losses and outputs within 1e-4, all gradients together within 1e-2 "
    "(Newton-Schulz magnifies rounding some hundred times); losses in bfloat16 and float16 within 5e-2 of float32's; "
    "tokens equal; a Trainer's loss finite and falling."
)

PROMPT = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), (2, 7, 1, 8, 2, 8, 1))
"""Prompts of different lengths, by token ids."""


@dataclass(frozen=True)
class ModelScale:
    """Sizes of the models.

    Attributes:
        width: of the residual stream; two heads of every kind.
        layers: blocks.
        tokens: in a training sequence; no multiple of the chunk.
        chunk: tokens.
        window: tokens that attention sees.
        image: side of pictures in pixels; the second of two sizes is half as large again.
        backend: of `torch.compile`.
    """

    width: int
    layers: int
    tokens: int
    chunk: int
    window: int
    image: int
    backend: str


FULL = ModelScale(width=256, layers=2, tokens=4 * 256 + 77, chunk=256, window=256, image=128, backend="inductor")
SMALL = ModelScale(width=32, layers=1, tokens=21, chunk=8, window=8, image=16, backend="aot_eager")


@dataclass(frozen=True)
class Promise:
    """One case.

    Attributes:
        name: what is promised.
        check: tries it on a device, and says by how much what is compared differs, or that a part is `missing`.
        bounds: on those numbers, by name; others are told and not held.
        gpu_only: it is about GPUs alone.
        needs: a package that is not of this library's own.
    """

    name: str
    check: Callable[[ModelScale, torch.device], dict[str, float]]
    bounds: dict[str, float]
    gpu_only: bool = False
    needs: str = ""


def precise(inner: InnerLoop) -> InnerLoop:
    """An inner loop whose Newton-Schulz runs in float32."""
    if inner.orthogonalize is None:
        return inner
    return inner.replace(orthogonalize=inner.orthogonalize.replace(dtype=torch.float32))


def language(scale: ModelScale, device: torch.device, rung: str = "rung2", **fields: Any) -> Any:
    """A language model of random weights."""
    from kvbind.models.lact import LactConfig, LactForCausalLM

    torch.manual_seed(0)
    inner = precise(systems.ladder(systems.lact_llm(scale.chunk))[rung])
    config = LactConfig(
        vocab_size=512, hidden_size=scale.width, num_hidden_layers=scale.layers, num_attn_heads=2, num_lact_heads=2,
        window_size=scale.window, inner=inner, initializer_range=0.1, bos_token_id=None, eos_token_id=None, **fields,
    )  # fmt: skip
    model: nn.Module = LactForCausalLM(config)
    return model.to(device)


def text(scale: ModelScale, device: torch.device, batch: int = 2) -> Tensor:
    """Token ids `[batch, tokens]`."""
    return torch.randint(0, 512, (batch, scale.tokens), generator=torch.Generator().manual_seed(0)).to(device)


def pictures(scale: ModelScale, device: torch.device, batch: int, sides: int) -> Tensor:
    """Pictures `[batch, 3, side, side]` of the first or second size."""
    side = scale.image * sides // 2
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(sides)).to(device)


def views(scale: ModelScale, device: torch.device, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, poses and intrinsics of one scene."""
    image = pictures(scale, device, count, 2)[None]
    angle = 0.2 * torch.arange(count, dtype=torch.float32)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, 0, 0], pose[:, 2, 2] = angle.cos(), angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, :3, 3] = torch.stack((angle, 0.1 * angle, -angle), dim=-1)
    side = float(scale.image)
    intrinsics = torch.tensor([side, side, side / 2, side / 2]).expand(count, 4)
    return image, pose[None].to(device), intrinsics[None].to(device)


Job = tuple[nn.Module, Callable[[nn.Module, int], Tensor]]
"""A model in training mode, and a loss of it at the first, second ... size of what it reads."""


def language_job(rung: str, scale: ModelScale, device: torch.device) -> Job:
    """The language model; its second size is a shorter sequence."""
    ids = text(scale, device)

    def loss(model: nn.Module, size: int) -> Tensor:
        part = ids[:, : ids.shape[1] - 3 * size]
        found: Tensor = model(input_ids=part, labels=part).loss
        return found

    return language(scale, device, rung).train(), loss


def vittt_job(scale: ModelScale, device: torch.device) -> Job:
    """ViTTT; its second size is a larger picture."""
    from kvbind.models.vittt import Vittt

    torch.manual_seed(0)
    model = Vittt(embed_dim=scale.width, depth=scale.layers, num_heads=2, patch_size=scale.image // 8, num_classes=10)
    target = torch.tensor([1, 2], device=device)

    def loss(model: nn.Module, size: int) -> Tensor:
        return nn.functional.cross_entropy(model(pictures(scale, device, 2, 2 + size)), target)

    return model.to(device).train(), loss


def views_job(scale: ModelScale, device: torch.device) -> Job:
    """View synthesis; its second size has a view more."""
    from kvbind.models.lact_nvs import LactNvs, LactNvsConfig

    torch.manual_seed(0)
    width = scale.width
    model = LactNvs(LactNvsConfig(dim=width, layers=scale.layers, head_dim=width // 2, fast_head_dim=width // 2))
    for layer in model.mixers:
        layer.inner = precise(layer.inner)

    def loss(model: nn.Module, size: int) -> Tensor:
        image, poses, intrinsics = views(scale, device, 3 + size)
        rendered: Tensor = model(image, poses, intrinsics, poses[:, :2], intrinsics[:, :2])
        return (rendered - image[:, :2]).square().mean()

    return model.to(device).train(), loss


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss and all gradients as one vector, in float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    parts = [x.grad.detach().double().flatten().cpu() for x in model.parameters() if x.grad is not None]
    return value.detach().double().cpu(), torch.cat(parts)


def difference(x: Tensor, reference: Tensor) -> float:
    """Relative, in norm; infinite where anything is not finite."""
    if not bool(x.isfinite().all()):
        return float("inf")
    return float((x.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))


def trains_compiled(
    make: Callable[[ModelScale, torch.device], Job], scale: ModelScale, device: torch.device
) -> dict[str, float]:
    """`model.compile(fullgraph=True)`: losses and gradients of two sizes, and how long the first step of each took."""
    model, loss = make(scale, device)
    expected = [gradients(model, partial(loss, model, size)) for size in (0, 1)]
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend=scale.backend)
    found: dict[str, float] = {"loss": 0.0, "gradients": 0.0}
    for size, (value, grads) in enumerate(expected):
        start = time.perf_counter()
        again, others = gradients(model, partial(loss, model, size))
        found[f"seconds of size {size + 1}"] = time.perf_counter() - start
        found["loss"] = max(found["loss"], difference(again, value))
        found["gradients"] = max(found["gradients"], difference(others, grads))
    return found


def reads_compiled(rung: str, scale: ModelScale, device: torch.device) -> dict[str, float]:
    """Compiled blocks without gradients, that return a state and go on from it."""
    from kvbind.models.lact.cache import CACHE

    model, ids = language(scale, device, rung).eval(), text(scale, device)

    def call(ids: Tensor, cache: Any) -> Any:
        return model(input_ids=ids, use_cache=True, **{CACHE: cache})

    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        for block in model.model.layers:
            block.compile(fullgraph=True, backend=scale.backend)
        first = call(ids[:, :-4], None)
        later = call(ids[:, -4:], getattr(first, CACHE))
    return {"output": difference(torch.cat((first.logits, later.logits), dim=1), whole)}


def step_by_step(model: Any, ids: Tensor, count: int) -> Tensor:
    """Greedy tokens behind `ids` `[1, T]`, each by a forward pass over all before it, without a cache."""
    for _ in range(count):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


def padded(device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts with padding at the left, and the mask."""
    longest = max(map(len, PROMPT))
    rows = [[0] * (longest - len(p)) + list(p) for p in PROMPT]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in PROMPT]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def generates(dtype: str, scale: ModelScale, device: torch.device, **options: Any) -> dict[str, float]:
    """`generate` for prompts of different lengths together, beside each alone; greedy also beside one token after another.

    Tokens are compared in float32. In narrower precision ties are broken by rounding: there the part of tokens that differs
    is told, and held is that all are of the vocabulary.
    """
    kind = getattr(torch, dtype)
    model, new = language(scale, device, pad_token_id=0).eval().to(kind), 2 * scale.chunk if scale is SMALL else 24
    ids, mask = padded(device)
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, **options}
    with torch.no_grad():
        torch.manual_seed(1)
        together = model.generate(ids, attention_mask=mask, **fixed)[:, ids.shape[1] :]
        torch.manual_seed(1)
        again = model.generate(ids, attention_mask=mask, **fixed)[:, ids.shape[1] :]
        found = {"repeats": float((together != again).sum()), "outside": float(((together < 0) | (together >= 512)).sum())}
        if options.get("do_sample"):
            return found
        alone = []
        for prompt in PROMPT:
            one = torch.tensor([prompt], device=device)
            tokens = model.generate(one, attention_mask=torch.ones_like(one), **fixed)
            alone.append(tokens[0, len(prompt) :])
            if not options and dtype == "float32":
                found["step by step"] = float((step_by_step(model, one, new) != tokens).sum()) + found.get("step by step", 0)
        name = "tokens alone" if dtype == "float32" else "part of tokens that differs alone"
        found[name] = float((torch.stack(alone) != together).double().sum())
        if dtype != "float32":
            found[name] /= together.numel()
    return found


def goes_on_from_cache(scale: ModelScale, device: torch.device) -> dict[str, float]:
    """`generate` from a cache that a forward pass left, beside the prompt in one."""
    from kvbind.models.lact.cache import CACHE

    model, ids = language(scale, device).eval(), text(scale, device)[:, : scale.chunk + 5]
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)
        cache = {CACHE: getattr(model(input_ids=ids[:, :-3], use_cache=True), CACHE)}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **fixed)
    return {"tokens": float((found != expected).sum())}


def trainer_learns(scale: ModelScale, device: torch.device, steps: int = 8, **arguments: Any) -> dict[str, float]:
    """Steps of transformers' Trainer on one batch."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model, ids = language(scale, device), text(scale, torch.device("cpu"))
    rows = [{"input_ids": row, "labels": row} for row in ids] * 8
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, max_steps=steps, learning_rate=3e-3, logging_steps=1, seed=0,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu", lr_scheduler_type="constant",
            **arguments,
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first loss": losses[0], "last over first": losses[-1] / losses[0] if losses[-1] == losses[-1] else float("inf")}


def checkpointing_keeps_gradients(reentrant: bool, scale: ModelScale, device: torch.device) -> dict[str, float]:
    """`gradient_checkpointing_enable` in one of PyTorch's two ways."""
    model, loss = language_job("rung2", scale, device)
    value, grads = gradients(model, partial(loss, model, 0))
    # the newest transformers' name of it
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    again, others = gradients(model, partial(loss, model, 0))
    return {"loss": difference(again, value), "gradients": difference(others, grads)}


def recompute_keeps_gradients(what: str, scale: ModelScale, device: torch.device) -> dict[str, float]:
    """`train.activation_checkpointing` changes no gradient."""
    from kvbind.train.recompute import recompute

    model, loss = language_job("rung2", scale, device)
    value, grads = gradients(model, partial(loss, model, 0))
    recompute(model.model.layers, what)  # type: ignore[arg-type, union-attr]
    again, others = gradients(model, partial(loss, model, 0))
    return {"loss": difference(again, value), "gradients": difference(others, grads)}


def autocast_is_near(
    make: Callable[[ModelScale, torch.device], Job], dtype: str, scale: ModelScale, device: torch.device
) -> dict[str, float]:
    """A training step under autocast, beside float32; its gradients finite."""
    model, loss = make(scale, device)
    value, _ = gradients(model, partial(loss, model, 0))

    def narrow() -> Tensor:
        with torch.autocast(device.type, dtype=getattr(torch, dtype)):
            return loss(model, 0)

    again, grads = gradients(model, narrow)
    return {"narrow loss": difference(again, value), "not finite": float((~grads.isfinite()).sum())}


def is_saved_whole(dtype: str, scale: ModelScale, device: torch.device) -> dict[str, float]:
    """`save_pretrained` and `from_pretrained`: the same logits, by either class."""
    from transformers import AutoModelForCausalLM

    from kvbind.models.lact import LactForCausalLM

    kind, ids = getattr(torch, dtype), text(scale, device)
    model = language(scale, device).to(kind).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        expected, found = model(input_ids=ids).logits, 0.0
        for loader in (LactForCausalLM, AutoModelForCausalLM):
            other: nn.Module = loader.from_pretrained(folder, dtype=kind)
            found = max(found, difference(other.to(device).eval()(input_ids=ids).logits, expected))
    return {"exactly": found}


def promises() -> list[Promise]:
    """All promises, in the order in which they are tried."""
    same, kept = {"loss": SAME, "gradients": SAME_GRADIENT}, {"repeats": 0.0, "outside": 0.0}
    families: dict[str, Callable[[ModelScale, torch.device], Job]] = {
        **{
            f"language model, {rung.replace('rung', 'rung ')}": partial(language_job, rung)
            for rung in ("rung0", "rung2", "rung6")
        },
        "ViTTT": vittt_job,
        "view synthesis": views_job,
    }
    found = [Promise(f"{name}: trains compiled", partial(trains_compiled, make), same) for name, make in families.items()]
    found += [
        Promise(
            f"language model, {rung.replace('rung', 'rung ')}: compiled blocks with a cache",
            partial(reads_compiled, rung),
            {"output": SAME},
        )
        for rung in ("rung0", "rung2")
    ]
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 50}, "beams": {"num_beams": 3}}
    for dtype in ("float32", "bfloat16"):
        for way, options in ways.items():
            exact = {"tokens alone": 0.0, "step by step": 0.0} if dtype == "float32" else {}
            found.append(Promise(f"generate, {way}, {dtype}", partial(generates, dtype, **options), kept | exact))
    found.append(Promise("generate from a cache", goes_on_from_cache, {"tokens": 0.0}))
    falls = {"last over first": 0.99}
    found += [
        Promise("Trainer, float32", trainer_learns, falls, needs="accelerate"),
        Promise("Trainer, bf16", partial(trainer_learns, bf16=True), falls, needs="accelerate"),
        # more steps: the scaler of gradients starts at 2^16 and skips those that overflow, some eight here
        Promise("Trainer, fp16", partial(trainer_learns, steps=24, fp16=True), falls, gpu_only=True, needs="accelerate"),
        Promise(
            "Trainer, bf16, checkpointed blocks", partial(trainer_learns, bf16=True, gradient_checkpointing=True), falls,
            needs="accelerate",
        ),
    ]  # fmt: skip
    for reentrant in (False, True):
        name = f"gradient checkpointing, {'reentrant' if reentrant else 'not reentrant'}"
        found.append(Promise(name, partial(checkpointing_keeps_gradients, reentrant), same))
    for what in ("block", "selective", "offload"):
        name = f"activation_checkpointing={what}"
        found.append(Promise(name, partial(recompute_keeps_gradients, what), same, gpu_only=what == "offload"))
    narrow = {"narrow loss": NARROW, "not finite": 0.0}
    for name, make in families.items():
        if "rung 6" not in name:
            found.append(Promise(f"{name}: bfloat16 autocast", partial(autocast_is_near, make, "bfloat16"), narrow))
    for name in ("language model, rung 2", "ViTTT"):
        check = partial(autocast_is_near, families[name], "float16")
        found.append(Promise(f"{name}: float16 autocast", check, narrow, gpu_only=True))
    found += [
        Promise(f"saved and loaded, {dtype}", partial(is_saved_whole, dtype), {"exactly": 0.0})
        for dtype in ("float32", "bfloat16")
    ]
    # a compiler takes a minute where the others take seconds
    return sorted(found, key=lambda promise: "compiled" in promise.name)


def tried(promise: Promise, scale: ModelScale, device: torch.device) -> dict[str, Any]:
    """The row of one case; an error is a row that says so."""
    row: dict[str, Any] = {"case": promise.name}
    if promise.needs and importlib.util.find_spec(promise.needs) is None:
        return row | {"passed": False, "problems": [f"{promise.needs} is not installed"]}
    found: dict[str, float] = {}
    start = time.perf_counter()
    try:
        with matmul_precision("highest"):
            operators = operators_of(lambda: found.update(promise.check(scale, device)))
    except Exception as problem:  # whatever it is
        return row | {"passed": False, "problems": [first_line(problem)], "seconds": time.perf_counter() - start}
    finally:
        torch._dynamo.reset()
        release()
    # not (x <= bound) is also true of NaN
    problems = [
        f"{name}: {found[name]:.1e} > {bound:.1e}"
        for name, bound in promise.bounds.items()
        if name in found and not found[name] <= bound
    ]
    return row | {
        "passed": not problems, "problems": problems, "found": found, "operators": operators,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _tried_by_name(name: str, small: bool, device: str) -> dict[str, Any]:
    """`tried` for processes that are told a case's name."""
    (promise,) = [p for p in promises() if p.name == name]
    return tried(promise, SMALL if small else FULL, torch.device(device))


def kept_promises(
    device: torch.device, *, small: bool = False, only: str = "", budget: float = 540.0, workers: int = 1
) -> Iterator[dict[str, Any]]:
    """Try every promise that can be tried on a device; the record as it is `growing`.

    Args:
        device: where to run.
        small: models of one layer and a quick compiler, to try the cases themselves.
        only: run only cases whose name has this in it.
        budget: seconds after which no further case is begun; the rest is then in the record, as `skipped`.
        workers: processes that share the device.

    Raises:
        ValueError: `only` is in no case's name.
    """
    deadline = time.monotonic() + budget
    chosen = [p for p in promises() if only in p.name and (device.type == "cuda" or not p.gpu_only)]
    if not chosen:
        raise ValueError(f"only must be part of a case's name, such as 'generate' or 'Trainer'; got {only!r}")

    def rows() -> Iterator[dict[str, Any]]:
        left = {p.name: p for p in chosen}
        if workers > 1:
            # what takes longest first: processes then end together
            jobs = [((p.name, small, str(device)), {"case": p.name}) for p in reversed(chosen)]
            for row in spread(_tried_by_name, jobs, workers, deadline):
                del left[row["case"]]
                yield row
        else:
            while left and time.monotonic() <= deadline:
                yield tried(left.pop(next(iter(left))), SMALL if small else FULL, device)
        for name in left:
            yield {"case": name, "passed": False, "problems": [OUT_OF_TIME], "skipped": OUT_OF_TIME}

    about = provenance(device, ("triton", "accelerate")) | {"config": {"small": small, "only": only}, "rules": RULES}
    order = [p.name for p in chosen]
    for record in growing(about, len(chosen), rows()):
        yield record | {"rows": sorted(record["rows"], key=lambda row: order.index(row["case"]))}
