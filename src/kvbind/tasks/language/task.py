"""The language task: packed text, a LaCT language model, next-token loss, perplexity on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.packed import uncovered
from kvbind.sequence import SequenceShard, sequence_parallel
from kvbind.sequence.boundaries import Boundaries, with_room
from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import Split
from kvbind.tasks.language.config import LanguageConfig, inner_loop
from kvbind.tasks.language.model import build_model
from kvbind.tasks.packing import IGNORED, Batch, Packed, evaluation_batches, load_batches
from kvbind.tasks.sources import TextSource
from kvbind.tasks.start import Start, divergence
from kvbind.tasks.tokenizers import open_tokenizer, read_chat_template
from kvbind.train.ranks import WHOLE, Share

if TYPE_CHECKING:
    from kvbind.models import LactForCausalLM


POSITION_BINS = 64


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
        source = TextSource(data.source, data.held_out, data.column, data.stream, data.name, data.part, data.encoding)
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
