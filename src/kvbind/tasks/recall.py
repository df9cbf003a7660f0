"""The recall task: multi-query associative recall (Zoology, arXiv 2312.04927), by which capacities of states are compared.

A row of random tokens begins with pairs, each a key and its value, all of them different. Behind them every key comes once
more, most of them soon and some late, by a power law; what is learned is to say its value, and nothing else. A model that
keeps a state must have all pairs in it, however short the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.value import check_choice
from kvbind.layers.attention.softmax import softmax_attention
from kvbind.layers.fast_weights.convolution import ShortConvolution
from kvbind.layers.operands import split_heads
from kvbind.tasks import inner_loops, preset_files
from kvbind.tasks.contents import Contents
from kvbind.tasks.inner_loops import table_rows
from kvbind.tasks.language.config import LanguageModelConfig, inner_loop, model_fields, resolved
from kvbind.train.config import TrainConfig
from kvbind.train.ranks import WHOLE, Share

if TYPE_CHECKING:
    from kvbind.models import LactForCausalLM

PRESETS = preset_files("recall")
"""The shipped configurations, by name."""

SMALLEST = "tiny"
"""The one that is taken where none is named."""

MIXERS = ("fast", "softmax")
"""What `model.mixer` can be here."""

CONVOLUTION = 4
"""Tokens that queries, keys and values of softmax attention are made of: as many as in the presets' other layers."""

TRAINING = 0
HELD_OUT = {"accuracy": 1, "validation_accuracy": 2}
"""What is measured on held-out rows, and where the seeds of these begin, as those of training do."""

Batch = dict[str, Tensor]
"""`input_ids` `[B, T]`; `places` `[B, n]`, where keys come once more, and `answers` `[B, n]`, their values; all int64."""


@dataclass
class RecallDataConfig:
    """The rows.

    Attributes:
        vocabulary: tokens; the lower half without 0 are keys, the upper half values, and any of them stands between.
        length: tokens in a row; at least four for each pair.
        pairs: how many a row has. Of several numbers the batches take turns, and accuracy is the mean over them.
        power: of the law by which keys come once more: `d^(power - 1)` is the weight of the d-th place behind the pairs.
        batch: rows in a batch.
        evaluation_samples: held-out rows of each number of pairs; as many others for validation.
        evaluation_batch: rows in an evaluation batch; 0 for as many as in training.
    """

    vocabulary: int = 8192
    length: int = 512
    pairs: list[int] = field(default_factory=lambda: [32])
    power: float = 0.01
    batch: int = 64
    evaluation_samples: int = 1024
    evaluation_batch: int = 0

    def __post_init__(self) -> None:
        for key, least in {"vocabulary": 4, "batch": 1, "evaluation_samples": 1, "evaluation_batch": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} must be at least {least}; got {getattr(self, key)}")
        if not self.power > 0:
            raise ValueError(f"data.power must be greater than 0; got {self.power}")
        most = min(self.length // 4, self.vocabulary // 2 - 1)
        if not self.pairs or any(not 1 <= pairs <= most for pairs in self.pairs):
            raise ValueError(
                f"data.pairs must be numbers from 1 to {most}, a quarter of data.length = {self.length} and less than half "
                f"of data.vocabulary = {self.vocabulary}; got {list(self.pairs)}"
            )


@dataclass
class RecallConfig:
    """A whole run: its seed (of weights and data), model, data and training.

    The model is one of the language task's, with any number of fields edited; its `mixer` is "fast" or "softmax".
    """

    seed: int = 0
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: RecallDataConfig = field(default_factory=RecallDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}")
        check_choice("model.mixer", self.model.mixer, MIXERS)

    @staticmethod
    def beneath(file: Any, edits: Any) -> Any:
        """What is left of a configuration file under further edits: the file's projections hold for every system."""
        return inner_loops.beneath(file, edits)


def resolve(config: RecallConfig) -> RecallConfig:
    """`config` with every field of its inner loop, and every field that its size gives, spelled out."""
    return replace(config, model=resolved(config.model))


def rows(config: RecallConfig) -> dict[str, Any]:
    """What `config.model.inner` is in each row of the paper's tables 1 and 2, as in the language task."""
    return table_rows(inner_loop(config.model))


def baselines(config: RecallConfig) -> dict[str, dict[str, Any]]:
    """None: models without fast weights are those of `model.mixer`."""
    return {}


class SoftmaxMixer(nn.Module):
    """Softmax attention to all tokens so far, on convolved queries, keys and values, in place of a layer of fast weights.

    Args:
        hidden_size: d.
        heads: attention heads.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.conv = ShortConvolution(3 * hidden_size, CONVOLUTION)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, *around: Any) -> tuple[Tensor, None]:
        """Mix the tokens of `x` `[B, T, d]`; further arguments as `FastWeightLayer.forward` takes them, and no state."""
        made = self.conv(F.pad(self.qkv(x), (0, 0, CONVOLUTION - 1, 0)))
        q, k, v = (split_heads(part, self.heads).transpose(1, 2) for part in made.chunk(3, dim=-1))
        mixed = softmax_attention(q, k, v, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output, None

    def state_bytes(self, length: int) -> int:
        """Bytes of the keys and values of `length` tokens of a row, and of what the convolution reads of the last ones."""
        weight = self.o_proj.weight
        return (2 * length + 3 * (CONVOLUTION - 1)) * weight.shape[0] * weight.element_size()


def build_model(config: RecallConfig) -> LactForCausalLM:
    """A model with fresh weights, drawn from the run's seed.

    Raises:
        ValueError, TypeError: a configuration that describes no model.
    """
    from kvbind.models import LactConfig, LactForCausalLM

    fields = model_fields(config.model) | {
        "vocab_size": config.data.vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "inner": inner_loop(config.model),
        "ttt_form": config.model.ttt_form,
    }
    torch.manual_seed(config.seed)
    model = LactForCausalLM(LactConfig(**fields))
    if config.model.mixer == "softmax":
        for block in model.model.layers:
            mixer = SoftmaxMixer(model.config.hidden_size, model.config.num_attn_heads)
            mixer.conv.reset_parameters()
            block.attn = mixer.apply(model._init_weights)
    return model


def draw(data: RecallDataConfig, pairs: int, rows: int, *seed: int) -> Batch:
    """Rows with `pairs` pairs each, from a seed of several numbers."""
    generator = np.random.default_rng(seed)

    def some(weights: float | Tensor, count: int) -> Tensor:
        """Numbers below `count`, `[rows, pairs]`, drawn one after another and not put back, by the logarithms of weights."""
        # which are those of the largest sums with Gumbel noise
        return (weights + torch.from_numpy(generator.gumbel(size=(rows, count)))).topk(pairs).indices

    half, behind = data.vocabulary // 2, 2 * pairs
    keys, values = 1 + some(0.0, half - 1), half + some(0.0, data.vocabulary - half)
    slots = torch.arange(1, (data.length - behind) // 2 + 1, dtype=torch.float64)
    places = behind + 2 * some((data.power - 1) * slots.log(), len(slots))
    ids = torch.from_numpy(generator.integers(data.vocabulary, size=(rows, data.length)))
    ids[:, :behind] = torch.stack((keys, values), dim=-1).flatten(1)
    return {"input_ids": ids.scatter_(1, places, keys), "places": places, "answers": values}


class RecallTask:
    """Data, model, loss and metrics of a recall run; what `kvbind.train.train` asks of a task.

    Args:
        config: the run.
        training: whether training rows will be read.
    """

    unit = "tokens"

    def __init__(self, config: RecallConfig, training: bool = True) -> None:
        self.config, self.batch = config, config.data.batch
        self.inner = inner_loop(config.model)

    def build(self) -> LactForCausalLM:
        """A model with fresh weights, drawn from the run's seed."""
        return build_model(self.config)

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless training batches, each with the position behind it."""
        data, first = self.config.data, position["batches"] if position else 0
        mine = share.rows(data.batch)
        while True:
            number = first + share.turn
            whole = draw(data, data.pairs[number % len(data.pairs)], data.batch, TRAINING, self.config.seed, number)
            first += share.turns
            yield {name: x[mine.start : mine.stop] for name, x in whole.items()}, {"batches": first}

    def size(self, batch: Batch) -> int:
        """Tokens in a batch."""
        return batch["input_ids"].numel()

    def weight(self, batch: Batch) -> float:
        """Batches count alike, whatever their number of pairs."""
        return 1.0

    def loss(self, model: LactForCausalLM, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers, in nats."""
        return F.cross_entropy(answer_logits(model, batch).flatten(0, 1), batch["answers"].flatten())

    @staticmethod
    def blocks(model: LactForCausalLM) -> Iterable[nn.Module]:
        """The model's layers."""
        return model.model.layers

    def evaluate(self, model: LactForCausalLM, share: Share = WHOLE) -> dict[str, Any]:
        """Accuracy in percent, of held-out rows and of those for validation; both, and the loss, means over `data.pairs`.

        "accuracy_by_pairs" is a list of `[pairs, accuracy]`.
        """
        data, device = self.config.data, next(model.parameters()).device
        counted = torch.zeros(len(HELD_OUT), len(data.pairs), 3, dtype=torch.float64)
        size = data.evaluation_batch or data.batch
        for i, start in enumerate(HELD_OUT.values()):
            for j, pairs in enumerate(data.pairs):
                for first, counts in share.of_items(range(0, data.evaluation_samples, size)):
                    rows = min(size, data.evaluation_samples - first)
                    batch = {name: x.to(device) for name, x in draw(data, pairs, rows, start, first).items()}
                    logits, answers = answer_logits(model, batch), batch["answers"]
                    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum")
                    right = (logits.argmax(-1) == answers).sum()
                    counted[i, j] += counts * torch.tensor([right.item(), loss.item(), answers.numel()])
        right, loss, answers = share.sum(counted).unbind(-1)
        accuracy, nats = 100 * right / answers, loss / answers
        return {
            **{name: float(x.mean()) for name, x in zip(HELD_OUT, accuracy, strict=True)},
            "loss": float(nats[0].mean()),
            "answers": int(answers[0].sum()),
            "accuracy_by_pairs": [[pairs, float(x)] for pairs, x in zip(data.pairs, accuracy[0], strict=True)],
        }

    def save(self, model: LactForCausalLM, folder: Path) -> None:
        """Write a model in transformers' format."""
        model.save_pretrained(folder)

    def contents(self) -> Contents:
        """No files: rows are drawn."""
        return Contents()

    def fingerprint(self) -> dict[str, str]:
        """What rows these are, for telling runs apart: the configuration says all of it."""
        return {"rows": "drawn"}


def answer_logits(model: LactForCausalLM, batch: Batch) -> Tensor:
    """The logits at the places of a batch's answers, `[B, n, vocabulary]`, in float32."""
    logits: Tensor = model(batch["input_ids"], logits_to_keep=batch["places"], use_cache=False).logits
    return logits.float()


Config = RecallConfig
Task = RecallTask
