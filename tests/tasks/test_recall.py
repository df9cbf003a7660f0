"""The recall task: what its rows hold, and that a model which finds each key again, and no other, is right."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvbind.tasks import recall
from kvbind.tasks.recall import PRESETS, RecallConfig, RecallDataConfig, RecallTask, SoftmaxMixer, draw
from kvbind.train import train
from kvbind.train.config import read_config, to_yaml
from kvbind.train.ranks import Share

SMALL = [
    "model.fields.hidden_size=16", "model.fields.intermediate_size=16", "data.vocabulary=16", "data.length=16",
    "data.pairs=[2,4]", "data.batch=8", "data.evaluation_samples=12", "train.device=cpu",
]  # fmt: skip


def small(*edits):
    return read_config(RecallConfig, PRESETS, "tiny", [*SMALL, *edits])


class Lookup(nn.Module):
    """Says, at each place, what stood behind the same token before it: behind the first of them, or the last."""

    def __init__(self, vocabulary, first=True):
        super().__init__()
        self.weight, self.vocabulary, self.first = nn.Parameter(torch.zeros(1)), vocabulary, first

    def forward(self, ids, logits_to_keep, use_cache):
        said = torch.zeros(*logits_to_keep.shape, self.vocabulary)
        for row, places in enumerate(logits_to_keep.tolist()):
            for i, place in enumerate(places):
                found = (ids[row, :place] == ids[row, place]).nonzero().flatten()
                said[row, i, ids[row, found[0 if self.first else -1] + 1]] = 9.0
        return type("Output", (), {"logits": said})


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(4, 60), st.integers(16, 90), st.integers(0, 99))
def test_every_key_comes_once_more_behind_all_pairs_and_is_answered_by_its_value(data, length, vocabulary, seed):
    pairs = data.draw(st.integers(1, min(length // 4, vocabulary // 2 - 1)))
    config = RecallDataConfig(vocabulary=vocabulary, length=length, pairs=[pairs])
    batch, again, other = (draw(config, pairs, 3, 1, number) for number in (seed, seed, seed + 1))
    ids, places, answers = batch["input_ids"], batch["places"], batch["answers"]
    keys, values = ids[:, : 2 * pairs].unflatten(1, (pairs, 2)).unbind(-1)
    half = vocabulary // 2
    assert ids.shape == (3, length)
    assert ids.min() >= 0
    assert ids.max() < vocabulary
    for x, least, most in ((keys, 1, half), (values, half, vocabulary), (places, 2 * pairs, length)):
        assert least <= x.min() <= x.max() < most
        assert all(len(set(row)) == pairs for row in x.tolist())
    assert not (places % 2).any()
    assert torch.equal(ids.gather(1, places), keys)
    assert torch.equal(answers, values)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(ids, other["input_ids"])


def test_places_follow_the_power_law():
    pairs, rows = 1, 20000
    config = RecallDataConfig(vocabulary=8, length=18, pairs=[pairs], power=0.5)
    slots = (draw(config, pairs, rows, 7)["places"].flatten() - 2 * pairs) // 2
    weights = torch.arange(1, 9, dtype=torch.float64) ** (0.5 - 1)
    expected = weights / weights.sum()
    found = torch.bincount(slots, minlength=8) / rows
    # four standard errors
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all()


def test_the_first_token_behind_a_key_is_right_and_the_last_is_not():
    task = RecallTask(small())
    right, wrong = (task.evaluate(Lookup(16, first)) for first in (True, False))
    assert right["accuracy"] == right["validation_accuracy"] == 100
    assert right["accuracy_by_pairs"] == [[2, 100.0], [4, 100.0]]
    assert right["answers"] == 12 * (2 + 4)
    assert wrong["accuracy"] < 100  # fillers come in between
    assert task.loss(Lookup(16), next(task.batches(None))[0]) < 0.02


def test_held_out_rows_are_those_of_no_other_kind():
    data = small().data
    seeds = [(start, 0) for start in recall.HELD_OUT.values()] + [(recall.TRAINING, 0, 0), (recall.TRAINING, 1, 0)]
    rows = {tuple(draw(data, 4, 4, *seed)["input_ids"].flatten().tolist()) for seed in seeds}
    assert len(rows) == len(seeds)


def test_shares_make_up_the_batches_and_go_on_where_they_stopped():
    task = RecallTask(small("seed=3"))
    stream = task.batches(None)
    whole = [next(stream) for _ in range(5)]
    halves = [task.batches(None, Share(part=i, parts=2)) for i in range(2)]
    turns = [task.batches(None, Share(turn=i, turns=2)) for i in range(2)]
    for batch, position in whole[:4]:
        parts = [next(half) for half in halves]
        assert torch.equal(torch.cat([part["input_ids"] for part, _ in parts]), batch["input_ids"])
        assert [place for _, place in parts] == [position, position]
    for number in range(4):
        batch, position = next(turns[number % 2])
        assert torch.equal(batch["input_ids"], whole[number][0]["input_ids"])
        assert position == {"batches": 2 + number // 2 * 2}
    again, _ = next(task.batches(whole[3][1]))
    assert torch.equal(again["places"], whole[4][0]["places"])
    assert [batch["places"].shape[1] for batch, _ in whole] == [2, 4, 2, 4, 2]


@pytest.mark.parametrize("mixer", recall.MIXERS)
def test_the_loss_is_that_of_the_answers_alone(mixer):
    task = RecallTask(small(f"model.mixer={mixer}"))
    model = task.build()
    batch, _ = next(task.batches(None))
    logits = model(batch["input_ids"], use_cache=False).logits
    each = [
        F.cross_entropy(row[places], answers) for row, places, answers in zip(logits, *list(batch.values())[1:], strict=True)
    ]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(each).mean())
    assert len(list(task.blocks(model))) == 2


def test_softmax_attention_sees_what_came_before_and_counts_what_it_keeps():
    torch.manual_seed(0)
    mixer = SoftmaxMixer(8, 2).double()
    mixer.conv.reset_parameters()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] = 0
    before, after = (mixer(given)[0] for given in (x, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])
    assert mixer.float().state_bytes(9) == 4 * (2 * 9 * 8 + 3 * 3 * 8)


def test_softmax_attention_learns_it(tmp_path):
    task = RecallTask(small(
        "model.mixer=softmax", "data.vocabulary=64", "data.pairs=[4]", "train.steps=300", "data.batch=32", "train.warmup=10",
        "data.evaluation_samples=64", "model.fields.intermediate_size=32", "model.fields.initializer_range=0.25",
    ))  # fmt: skip
    torch.manual_seed(0)
    done = train(task.build(), task, task.config.train, tmp_path)
    assert done.held_out["accuracy"] > 80


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_whole_configuration_that_reads_back_the_same(preset, tmp_path):
    config = recall.resolve(read_config(RecallConfig, PRESETS, preset))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert read_config(RecallConfig, {}, str(tmp_path / "saved.yaml")) == config
    # else keys in a query's own chunk would be out of reach
    assert all(2 * pairs % recall.inner_loop(config.model).chunk == 0 for pairs in config.data.pairs)


def test_the_presets_convolution_stays_whatever_the_system():
    for name in ("gla", "rwkv7", "ttt_linear", "linear_attention", "lact_llm"):
        layer = RecallTask(small(f"model.inner.system={name}")).build().model.layers[0].attn
        assert layer.conv.width == 4, name


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("data.pairs=[5]", r"data.pairs must be numbers from 1 to 4, a quarter of data.length = 16 .*got \[5\]"),
        ("data.pairs=[]", "data.pairs must be numbers"),
        ("data.vocabulary=3", "data.vocabulary must be at least 4; got 3"),
        ("data.power=0", "data.power must be greater than 0"),
        ("model.mixer=in_place", "model.mixer must be one of 'fast', 'softmax'; got 'in_place'"),
        ("seed=-1", "seed must be at least 0"),
    ],
)
def test_what_describes_no_rows_is_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        small(edit)
