"""The language task: packed text, a LaCT language model, next-token loss, perplexity on held-out documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.packed import uncovered
from kvbind.inner import InnerLoop
from kvbind.inner.projections import Projections
from kvbind.inner.systems import PROJECTIONS
from kvbind.inner.value import LATER, check_choice, nearest
from kvbind.layers.fitting import check_fits_causal_layer
from kvbind.models.opening import open_exported
from kvbind.models.presets import PRESETS as SIZES
from kvbind.sequence import SequenceShard, sequence_parallel
from kvbind.sequence.boundaries import Boundaries, with_room
from kvbind.tasks import inner_loops, preset_files
from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import Split
from kvbind.tasks.inner_loops import SOFTMAX, WINDOW, edited, more_hidden, table_rows
from kvbind.tasks.packing import IGNORED, Batch, Packed, evaluation_batches, load_batches
from kvbind.tasks.sources import Source
from kvbind.tasks.start import Start, StartConfig, divergence
from kvbind.tasks.tokenizers import Bytes, Tokenizer, open_tokenizer, read_chat_template
from kvbind.train.config import TrainConfig, check_seed
from kvbind.train.ranks import WHOLE, Share

if TYPE_CHECKING:
    from kvbind.models import LactForCausalLM

PRESETS = preset_files("language")
"""The shipped configurations, by name."""

POSITION_BINS = 64

MIXERS = ("fast", "in_place")
"""What `model.mixer` can be in this task."""

LEAST_LENGTH = 512
"""Tokens in the samples of a saved model, where it was made for as many."""


@dataclass
class ModelConfig:
    """The LaCT language model; its vocabulary is the tokenizer's, unless `fields` has a larger one.

    Attributes:
        size: where it starts: a preset of `kvbind.models`, "tiny", "30m", "125m", "760m" or "3b".
        inner: edits of that size's inner loop, field by field; "system" names another to start from (`kvbind systems` lists
            them). With a system comes the layer that it was published in, where there is one
            (`kvbind.inner.systems.PROJECTIONS`).
        fields: edits of any other field of `kvbind.models.LactConfig`; a `vocab_size` leaves room beside the tokenizer's
            tokens. `projections` edits those of the system field by
            field; a name takes those of another, and null leaves its inner loop in the LaCT layer.
        ttt_form: how the inner loop is evaluated: "auto", "recurrent" or "parallel".
        mixer: where fast weights are: "fast", in layers that mix tokens, as above; or "in_place", in the MLPs of a Llama of
            the same sizes (In-Place TTT), in chunks as long as the inner loop's.
    """

    size: str = "tiny"
    inner: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    ttt_form: str = "auto"
    mixer: str = "fast"

    LATER: ClassVar[dict[str, Any]] = {"mixer": "fast"}
    """What `kvbind.train.config.what_matters` leaves out at this value: runs from before the key have no other, and keep
    their names."""


@dataclass
class DataConfig:
    """Text, and how it is packed.

    Attributes:
        source: "stdlib" (the Python standard library's source), "linux" (the Linux kernel's C source, from Debian's package
            linux-source), "package:NAME" (an installed Python package's), a folder or file of text, JSONL or parquet, or
            "hub:NAME".
        column: of tables, the column that holds the text.
        stream: read local JSONL or parquet as it comes, where it is too large to be gone through beforehand.
        name: of hub data sets, the configuration.
        part: of hub data sets, the published split.
        encoding: of text and JSONL files, as Python names it; parquet is always UTF-8.
        held_out: the fraction of documents kept for evaluation, chosen by a stable hash; where there are too few for that,
            the last part of each.
        held_out_source: other text to evaluate on, all of it; training then reads all of `source`. "linux-others" are
            subsystems that "linux" has not.
        held_out_name: of a hub `held_out_source`, the configuration.
        held_out_part: of a hub `held_out_source`, the published split.
        tokenizer: "bytes", or a name or folder that transformers' `AutoTokenizer` loads.
        chat_template: what is saved with the tokenizer for `apply_chat_template`: "plain" (`role: content`, a blank line),
            a file of a Jinja template, or "" for the tokenizer's own, if it has one. Training does not look at it.
        length: tokens in a sample.
        batch: samples in a batch.
        window: samples that are shuffled together.
        streams: readings of the text that take turns, sample by sample, each of its own documents. Several processes or
            workers that train together read no text twice where there is a stream for each; the order depends on it.
        separate: documents stay apart in attention and fast weights (`cu_seqlens`); else they run on as one text.
        workers: processes that read, for each one that trains, at most as many as it has streams; 0 for none besides it.
            Nothing but speed depends on it.
        evaluation_samples: held-out samples, spread over the held-out text.
        evaluation_batch: samples in an evaluation batch; 0 for as many as in training.
    """

    source: str = "stdlib"
    column: str = "text"
    stream: bool = False
    name: str | None = None
    part: str = "train"
    encoding: str = "utf-8"
    held_out: float = 0.1
    held_out_source: str | None = None
    held_out_name: str | None = None
    held_out_part: str = "test"
    tokenizer: str = "bytes"
    chat_template: str = ""
    length: int = 512
    batch: int = 8
    window: int = 1024
    streams: int = 1
    separate: bool = False
    workers: int = 0
    evaluation_samples: int = 64
    evaluation_batch: int = 0

    INDIFFERENT: ClassVar[tuple[str, ...]] = ("workers", "encoding", "chat_template")
    """What `kvbind.train.config.what_matters` leaves out; an encoding is told apart by what is read, as files are, and a
    chat template is written beside the model."""

    def __post_init__(self) -> None:
        for key, least in {"length": 2, "batch": 1, "window": 1, "streams": 1, "workers": 0, "evaluation_samples": 1,
                           "evaluation_batch": 0}.items():  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} must be at least {least}; got {getattr(self, key)}")


@dataclass
class LanguageConfig:
    """A whole run: its seed (of weights and data order), model, data, training, and the saved model that it starts from."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig = field(default_factory=StartConfig, metadata=LATER)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("model.mixer", self.model.mixer, MIXERS)

    @staticmethod
    def beneath(file: Any, edits: Any) -> Any:
        """What is left of a configuration file under further edits: another system's come with its own layer."""
        left = inner_loops.beneath(file, edits)
        if _system(edits) is None or not isinstance(left, dict) or not isinstance(left.get("model"), dict):
            return left
        fields = left["model"].get("fields")
        if not isinstance(fields, dict) or _system(file) == _system(edits):
            return left
        kept = {name: x for name, x in fields.items() if name != "projections"}
        return {**left, "model": {**left["model"], "fields": kept}}


def inner_loop(model: ModelConfig) -> InnerLoop:
    """The inner loop that a model's configuration describes.

    Raises:
        ValueError, TypeError: an unknown size, system or field (the message gives the nearest known one), a value that
            does not fit, or an inner loop that is not causal.
    """
    return edited(model_fields(model)["inner"], model.inner, check_fits_causal_layer)


def model_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of `LactConfig` that `model.size` and `model.fields` give.

    Raises:
        ValueError: an unknown size, or a field that has its own place.
    """
    if model.size not in SIZES:
        raise ValueError(f"model.size must be one of {', '.join(SIZES)}; got {model.size!r}{nearest(model.size, SIZES)}")
    for name, where in {"inner": "model.inner", "ttt_form": "model.ttt_form"}.items():
        if name in model.fields:
            raise ValueError(f"model.fields must not hold {name!r}, which {where} gives")
    made = projections(model)
    return {**SIZES[model.size], **model.fields, **({} if made is None else {"projections": made.to_dict()})}


def projections(model: ModelConfig) -> Projections | None:
    """The projections of a model's fast weights: those of its system, edited; None in the LaCT layer.

    Raises:
        ValueError, TypeError: the name of no system, or a field that is unknown or does not fit.
    """
    given = model.fields.get("projections", {})
    system = model.inner.get("system")
    own = PROJECTIONS.get(system) if isinstance(system, str) else None
    if isinstance(given, str):
        if given not in PROJECTIONS:
            known = ", ".join(PROJECTIONS)
            raise ValueError(f"projections must be those of one of {known}; got {given!r}{nearest(given, PROJECTIONS)}")
        return PROJECTIONS[given]
    if given is None or (own is None and "projections" not in model.fields):
        return None
    if not isinstance(given, dict):
        raise TypeError(f"projections must be fields, the name of a system or null; got {given!r}")
    return Projections.from_dict(({} if own is None else own.to_dict()) | given)


def _system(tree: Any) -> Any:
    inner = tree.get("model", {}).get("inner") if isinstance(tree, dict) and isinstance(tree.get("model"), dict) else None
    return inner.get("system") if isinstance(inner, dict) else None


def build_model(config: LanguageConfig, tokenizer: Tokenizer) -> Any:
    """A model with fresh weights, drawn from the run's seed: a `LactForCausalLM`, or what `model.mixer` names.

    Raises:
        ValueError, TypeError: a configuration that describes no model.
    """
    from kvbind.models import LactConfig, LactForCausalLM

    room = config.model.fields.get("vocab_size", tokenizer.vocab_size)
    if room < tokenizer.vocab_size:
        raise ValueError(
            f"model.fields must have a vocab_size of at least {tokenizer.vocab_size}, as data.tokenizer has; got {room}"
        )
    fields = model_fields(config.model) | {
        "vocab_size": room,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end,
        "inner": inner_loop(config.model),
        "ttt_form": config.model.ttt_form,
    }
    torch.manual_seed(config.seed)
    if config.model.mixer == "fast":
        model: Any = LactForCausalLM(LactConfig(**fields))
    else:
        from kvbind.models.peers import in_place_llama

        model = in_place_llama(LactConfig(**fields))
        model.generation_config.eos_token_id = tokenizer.end
    # of prompts alone: in training nothing is padding, and every embedding learns
    model.generation_config.pad_token_id = tokenizer.end
    return model


def resolve(config: LanguageConfig) -> LanguageConfig:
    """`config` with every field of its inner loop, and every field that its size gives, spelled out."""
    return replace(config, model=resolved(config.model), start=config.start.resolved())


def resolved(model: ModelConfig) -> ModelConfig:
    """A model's configuration with every field of its inner loop, and every field that its size gives, spelled out."""
    own = {name for name in ("inner", "vocab_size") if name not in model.fields}
    fields = {name: x for name, x in model_fields(model).items() if name not in own}
    return replace(model, inner=inner_loop(model).to_dict(), fields=fields)


DESCRIBED_ELSEWHERE = frozenset({
    "inner", "ttt_form", "pad_token_id", "bos_token_id", "eos_token_id", "lact_chunk_size", "use_muon", "use_momentum",
    "ttt_prenorm", "ttt_loss_type",
})  # fmt: skip
"""Arguments of `LactConfig` that `model.fields` has no use for."""


def describe(model: LactForCausalLM, folder: Path) -> LanguageConfig:
    """The configuration of a run whose model is a saved one; its data are to be named.

    Samples are eight chunks of the inner loop long, at least 512 tokens and at most what the model was made for.

    Args:
        model: as its folder holds it.
        folder: the model's, with its tokenizer; without one, of as many tokens as there are bytes, it reads those.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    config = model.config
    plain, known = config.to_dict(), inspect.signature(type(config).__init__).parameters
    fields = {name: plain[name] for name in known if name in plain and name not in DESCRIBED_ELSEWHERE}
    length = min(config.max_position_embeddings, max(LEAST_LENGTH, 8 * (config.inner.chunk or 1)))
    return LanguageConfig(
        model=ModelConfig(inner=config.inner.to_dict(), fields=fields, ttt_form=config.ttt_form),
        data=DataConfig(tokenizer=tokenizer_of(folder, config.vocab_size), length=length),
    )


def rows(config: LanguageConfig) -> dict[str, Any]:
    """What `config.model.inner` is in each row of the paper's tables 1 and 2.

    Args:
        config: the full system's; its other edits of the inner loop hold for every row.

    Returns:
        By name: "rung0" to "rung6", the ladder; "ascent" and "key_for_query", each one change of the full system.
    """
    return table_rows(inner_loop(config.model))


FULL = 32768
"""The window of the baseline with full attention: no evaluation reads more tokens at once."""


def baselines(config: LanguageConfig) -> dict[str, dict[str, Any]]:
    """Edits of `config.model.fields` that make the models without fast weights, by row.

    Widths, depth and heads are the full system's; what that has in parameters of its fast weights goes into wider MLPs.

    Returns:
        "window", attention over the same window alone, and "softmax", full attention; none of a model of layers without
        attention.
    """
    from kvbind.models import LactConfig
    from kvbind.models.lact.model import LactBlock

    own = LactConfig(**model_fields(config.model) | {"inner": inner_loop(config.model)})
    if own.projections is not None:
        return {}
    without = LactConfig(**{**model_fields(config.model), "fast_weights": False})
    wider = own.mlp_width + more_hidden(LactBlock, own, without, 3 * own.hidden_size)
    edits = {"fast_weights": False, "intermediate_size": wider}
    return {WINDOW: edits, SOFTMAX: {**edits, "window_size": max(FULL, config.data.length)}}


class LanguageTask:
    """Data, model, loss and metrics of a language run; what `kvbind.train.train` asks of a task.

    Opening it reads the held-out samples, so that a source that does not exist is known at once.

    Args:
        config: the run.
        training: whether training text will be read; False to evaluate alone.
    """

    unit = "tokens"

    def __init__(self, config: LanguageConfig, training: bool = True) -> None:
        data = config.data
        self.config, self.batch = config, data.batch
        self.inner = inner_loop(config.model)  # one that is none is better known before any text is read
        if data.separate and config.model.mixer != "fast":
            raise ValueError(f"data.separate must be false where model.mixer is {config.model.mixer!r}; got true")
        self.tokenizer = open_tokenizer(data.tokenizer)
        self.chat_template = read_chat_template(data.chat_template, self.tokenizer)
        self.start = Start.of(config.start, training)
        source = Source(data.source, data.held_out, data.column, data.stream, data.name, data.part, data.encoding)
        split: Split | None = "train"
        if data.held_out_source:
            elsewhere = replace(
                source, where=data.held_out_source, name=data.held_out_name, part=data.held_out_part,
                argument="data.held_out_source",
            )  # fmt: skip
            held_out, split = elsewhere.open(None), None
        else:
            held_out = source.open("held_out")
        self.documents = source.open(split) if training else None
        self.evaluation, self.bytes_per_token = evaluation_batches(
            held_out, self.tokenizer, length=data.length, batch=data.evaluation_batch or data.batch,
            samples=data.evaluation_samples, separate=data.separate,
        )  # fmt: skip
        self.held_out_fingerprint, self.held_out_contents = held_out.fingerprint(), held_out.contents()

    def build(self) -> LactForCausalLM:
        """A model with fresh weights, drawn from the run's seed, or with those of the model that the run starts from."""
        model = build_model(self.config, self.tokenizer)
        return model if self.start is None else self.start.into(model)

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless training batches, each with the position behind it."""
        data = self.config.data
        if self.documents is None:
            raise ValueError("this task was opened with training=False")
        packed = Packed(
            self.documents, self.tokenizer, length=data.length, batch=data.batch, window=data.window,
            seed=self.config.seed, streams=data.streams, position=position, share=share,
        )  # fmt: skip
        return load_batches(packed, data.separate, data.workers)

    def size(self, batch: Batch) -> int:
        """Tokens in a batch."""
        return batch["input_ids"].numel()

    def weight(self, batch: Batch) -> float:
        """Tokens that a batch predicts, over those that samples of joined text do."""
        length = self.config.data.length
        most = batch["labels"].numel() // length * (length - 1)
        return float((batch["labels"][:, 1:] != IGNORED).sum()) / most if "cu_seqlens" in batch else 1.0

    def flops(self, model: LactForCausalLM) -> float:
        """Model FLOPs of training for each unit."""
        from kvbind.tasks.flops import flops_per_unit

        return flops_per_unit(model.config, self.config.data)

    def uncapturable(self, batch: Batch) -> str | None:
        """Why a step on a batch cannot be replayed as a CUDA graph; None where it can."""
        if "cu_seqlens" not in batch:
            return None
        inners = [self.inner, *(self.start.inner_loops() if self.start is not None else [])]
        reason = next(filter(None, (uncovered(inner, batch["input_ids"].shape[1]) for inner in inners)), None)
        return None if reason is None else f"the boundaries of packed documents are read by the host, as {reason}"

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """A batch of which the device alone reads where documents end: `boundaries`, of few sizes, for `cu_seqlens`."""
        if "cu_seqlens" not in batch or self.uncapturable(batch) is not None:
            return batch
        rest = {name: x for name, x in batch.items() if name != "cu_seqlens"}
        return {**rest, "boundaries": with_room(batch["cu_seqlens"].to(device))}

    def loss(self, model: LactForCausalLM, batch: Batch) -> Tensor:
        """Mean next-token cross-entropy, in nats; of a batch as it comes, or prepared.

        Where the targets are the outputs of the model that the run starts from, the divergence from those.
        """
        given: dict[str, Any] = dict(self.prepare(batch, batch["input_ids"].device))
        if "boundaries" in given:
            given["cu_seqlens"] = Boundaries(given.pop("boundaries"), given["input_ids"].shape[1])
        if self.start is not None and self.start.distils:
            labels = given.pop("labels")
            wanted = self.start.outputs(**given, use_cache=False, device=labels.device).logits
            counted = F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
            return divergence(model(**given, use_cache=False).logits, wanted, counted)
        loss: Tensor = model(**given, use_cache=False).loss
        return loss

    def shard(self, batch: Batch, group: Any) -> SequenceShard:
        """How the processes of a group divide the rows of a batch: evenly, and between spans of the inner loop.

        Raises:
            ValueError: a model whose rows are not divided.
        """
        if self.config.model.mixer != "fast":
            raise ValueError(
                f"train.parallel.sequence must be 1 where model.mixer is {self.config.model.mixer!r}; got a group of several"
            )
        ids, span = batch["input_ids"], self.inner.span
        return SequenceShard.even(ids.shape[1], group, cu_seqlens=batch.get("cu_seqlens"), multiple=span or 1)

    def cut(self, batch: Batch, group: Any) -> tuple[Batch, AbstractContextManager[None]]:
        """This process's part of every sequence of a batch, and the context in which a model sees the others'.

        Raises:
            ValueError: outputs as targets, which are those of whole sequences.
        """
        if self.start is not None and self.start.distils:
            raise ValueError("train.parallel.sequence must be 1 with start.targets='outputs'")
        from kvbind.models.lact.sharding import shard_batch

        shard = self.shard(batch, group)
        return shard_batch(batch, shard), sequence_parallel(shard)

    @staticmethod
    def blocks(model: LactForCausalLM) -> Iterable[nn.Module]:
        """The model's layers."""
        return getattr(model, "base", model).model.layers

    def evaluate(self, model: LactForCausalLM, share: Share = WHOLE) -> dict[str, Any]:
        """Perplexity per token, bits per byte, loss in nats, the number of predicted tokens, and the loss by position.

        "loss_by_position" is a list of `[position, loss]`: tokens at that place of their sequence and up to the next listed
        one, averaged.
        """
        device = next(model.parameters()).device
        longest = self.config.data.length
        width = -(-longest // POSITION_BINS)
        sums = torch.zeros(2, POSITION_BINS, dtype=torch.float64)
        for whole, counts in share.of_items(self.evaluation):
            labels, places = (F.pad(x[:, 1:], (0, 1), value=IGNORED) for x in (whole["labels"], positions(whole)))
            batch: Batch = {name: x for name, x in whole.items() if name != "labels"}
            inside: AbstractContextManager[None] = nullcontext()
            if share.sequence is not None:
                shard = self.shard(whole, share.sequence)
                labels, places = shard.take(labels), shard.take(places)
                batch, inside = self.cut(batch, share.sequence)
            with inside:
                logits = model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False).logits
            losses = token_losses(logits, labels.to(device)).cpu().double()
            counted = (labels != IGNORED).double() * counts
            bins = places.clamp(min=0) // width
            sums[0] += torch.bincount(bins.flatten(), (losses * counted).flatten(), POSITION_BINS)
            sums[1] += torch.bincount(bins.flatten(), counted.flatten(), POSITION_BINS)
        total, count = share.sum(sums)
        loss = float(total.sum() / count.sum())
        filled = [i for i in range(POSITION_BINS) if count[i]]
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "loss": loss,
            "tokens": int(count.sum()),
            "loss_by_position": [[i * width, float(total[i] / count[i])] for i in filled],
        }

    def save(self, model: LactForCausalLM, folder: Path) -> None:
        """Write a model in transformers' format, with its tokenizer."""
        model.save_pretrained(folder)
        tokenizer = self.tokenizer.for_transformers()
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        tokenizer.save_pretrained(folder)

    def contents(self) -> Contents:
        """What the text is read from, for noticing that it has changed."""
        found = self.held_out_contents
        return found if self.documents is None else self.documents.contents() | found

    def fingerprint(self) -> dict[str, str]:
        """What text this is, for telling runs apart."""
        texts = {"held_out": self.held_out_fingerprint}
        if self.documents is not None:
            texts["train"] = self.documents.fingerprint()
        return texts


def positions(batch: Batch) -> Tensor:
    """Each token's place in its own sequence, `[B, T]`."""
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].long()
        places = places - torch.repeat_interleave(bounds[:-1], bounds.diff())
    return places


def token_losses(logits: Tensor, targets: Tensor, rows: int = 4096) -> Tensor:
    """Cross-entropy of every token, `[B, T]`, float32; 0 where the target is ignored.

    Args:
        logits: `[B, T, vocabulary]`, any dtype.
        targets: `[B, T]`, what each of them predicts.
        rows: tokens whose logits are in float32 at one time.
    """
    parts = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(x.float(), y, ignore_index=IGNORED, reduction="none") for x, y in parts]
    return torch.cat(losses).reshape(targets.shape)


def open_trained(folder: Path, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """A trained model and its tokenizer, without any text. Weights come from safetensors alone.

    Args:
        folder: of a finished training run, or a model in transformers' format, such as the run's `model/`.
        tokenizer: its name; default the model folder's own, or bytes where it has none and the vocabulary is theirs.

    Raises:
        ValueError: a folder that holds neither, or a model without a tokenizer where none is named.
    """
    home = folder / "model" if (folder / "config.yaml").is_file() else folder
    if not (home / "config.json").is_file():
        if home != folder:
            raise ValueError(f"run must be finished; {str(folder)!r} has no model/ yet, which training leaves there")
        raise ValueError(f"run must be the folder of a training run or of a model; got {str(folder)!r}")
    model = open_exported(home)
    if not getattr(model, "can_generate", bool)():
        raise ValueError(f"run must be of a language model; {str(home)!r} holds a {type(model).__name__}")
    # of a model around another one, that one's
    room = model.config.get_text_config().vocab_size
    opened = open_tokenizer(tokenizer_of(home, room) if tokenizer is None else tokenizer)
    if opened.vocab_size > room:
        raise ValueError(
            f"tokenizer must have at most the {room} tokens that the model in {str(home)!r} knows; "
            f"{tokenizer!r} has {opened.vocab_size}"
        )
    return model, opened


def tokenizer_of(folder: Path, vocabulary: int) -> str:
    """The tokenizer beside a model, or bytes where there is none and the vocabulary is theirs.

    Raises:
        ValueError: neither.
    """
    if any(folder.glob("tokenizer*")):
        return str(folder)
    if vocabulary == Bytes.vocab_size:
        return "bytes"
    raise ValueError(f"tokenizer must be 'bytes' or a tokenizer by name, as {str(folder)!r} holds none")


Config = LanguageConfig
Task = LanguageTask
