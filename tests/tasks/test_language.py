import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kvbind import Linear, NewtonSchulz, systems
from kvbind.models.in_place import InPlaceForCausalLM
from kvbind.tasks import language, open_task_module
from kvbind.tasks.language import (
    PRESETS,
    LanguageConfig,
    LanguageTask,
    inner_loop,
    open_trained,
    resolve,
)
from kvbind.tasks.language.config import LanguageModelConfig
from kvbind.tasks.language.task import positions, token_losses
from kvbind.tasks.tokenizers import Bytes
from kvbind.train import train
from kvbind.train.config import read_config, to_yaml, what_matters

SMALL = [
    "model.fields.hidden_size=32", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.window_size=16", "model.inner.chunk=16", "data.length=64", "data.batch=2", "data.evaluation_samples=4",
    "train.device=cpu",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def small(text, *edits):
    return read_config(LanguageConfig, PRESETS, "tiny", [*SMALL, f"data.source={text}", *edits])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_whole_configuration_that_reads_back_the_same(preset, tmp_path):
    config = resolve(read_config(LanguageConfig, PRESETS, preset))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert read_config(LanguageConfig, {}, str(tmp_path / "saved.yaml")) == config
    assert resolve(config) == config


def test_the_760m_preset_is_the_papers_setup():
    config = resolve(read_config(LanguageConfig, PRESETS, "760m"))
    fields, data = config.model.fields, config.data
    shape = {"hidden_size": 1536, "num_hidden_layers": 24, "num_attn_heads": 24, "num_lact_heads": 4, "window_size": 2048}
    assert {name: fields[name] for name in shape} == shape
    assert inner_loop(config.model) == systems.lact_llm(chunk=2048)
    assert (config.train.steps, data.batch * config.train.accumulate, data.length) == (20000, 32, 32768)
    assert "fineweb-edu" in data.source


def test_the_inner_loop_is_a_named_system_with_edits():
    edits = {"update": "last", "network": "Linear", "orthogonalize": {"dtype": "float32"}}
    expected = systems.lact_llm(chunk=64).replace(
        update="last", network=Linear(), orthogonalize=NewtonSchulz(dtype=torch.float32)
    )
    assert inner_loop(LanguageModelConfig(size="tiny", inner=edits)) == expected
    assert inner_loop(LanguageModelConfig(inner={"system": "delta_net", "chunk": 4})) == systems.delta_net(chunk=4)
    assert inner_loop(LanguageModelConfig(inner=expected.to_dict())) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LanguageModelConfig(size="tinny"), r"model\.size must be one of .*\(did you mean 'tiny'\?\)"),
        (LanguageModelConfig(inner={"system": "lact_lm"}), r"did you mean 'lact_llm'"),
        (LanguageModelConfig(inner={"updat": "last"}), r"did you mean 'update'"),
        (
            LanguageModelConfig(fields={"ttt_form": "auto"}),
            r"model\.fields must not hold 'ttt_form', which model\.ttt_form gives",
        ),
    ],
)
def test_a_wrong_model_is_named(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        inner_loop(model)


def test_a_system_comes_with_its_layer_until_told_otherwise():
    def made(inner, fields=None):
        return resolve(LanguageConfig(model=LanguageModelConfig(inner=inner, fields=fields or {}))).model.fields

    own = systems.PROJECTIONS["delta_net"]
    assert made({"system": "delta_net"})["projections"] == own.to_dict()
    assert made({"system": "delta_net"}, {"projections": {"conv": 3}})["projections"] == own.replace(conv=3).to_dict()
    assert made({"system": "delta_net"}, {"projections": None})["projections"] is None
    assert made({"system": "delta_net"}, {"projections": "kda"})["projections"] == systems.PROJECTIONS["kda"].to_dict()
    assert "projections" not in made({"system": "lact_llm"})
    assert "projections" not in made({})
    resolved = resolve(LanguageConfig(model=LanguageModelConfig(inner={"system": "delta_net"})))
    assert resolve(resolved) == resolved
    for fields, message in (
        ({"projections": "delta_nett"}, r"did you mean 'delta_net'"),
        ({"projections": {"convv": 3}}, r"did you mean 'conv'"),
        ({"projections": 3}, "projections must be fields, the name of a system or null"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            made({"system": "delta_net"}, fields)


def test_a_files_layer_goes_with_its_system():
    file = {"model": {"fields": {"projections": {"conv": 4}, "hidden_ratio": 2}, "inner": {"chunk": 1}}}
    edits = {"model": {"inner": {"system": "gla"}}}
    assert LanguageConfig.beneath(file, edits)["model"]["fields"] == {"hidden_ratio": 2}
    assert LanguageConfig.beneath(file, {"model": {"inner": {"chunk": 2}}}) == file
    named = {"model": {**file["model"], "inner": {"system": "gla"}}}
    assert LanguageConfig.beneath(named, edits)["model"]["fields"] == file["model"]["fields"]


def test_token_losses_are_the_cross_entropy_of_their_targets():
    logits, targets = torch.randn(2, 9, 11), torch.randint(11, (2, 9))
    targets[0, 3] = -100
    losses = token_losses(logits, targets, rows=4)
    torch.testing.assert_close(losses, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    assert losses[0, 3] == 0


def test_the_evaluation_is_the_models_own_loss(text):
    task = LanguageTask(small(text))
    model = task.build().eval()
    with torch.no_grad():
        metrics = task.evaluate(model)
        own = sum(model(**batch, use_cache=False).loss * len(batch["input_ids"]) for batch in task.evaluation)
    samples = sum(len(batch["input_ids"]) for batch in task.evaluation)
    assert metrics["loss"] == pytest.approx(float(own) / samples, rel=1e-5)
    assert metrics["tokens"] == samples * 63
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2))
    places = [place for place, _ in metrics["loss_by_position"]]
    assert places == list(range(1, 64))
    assert sum(loss for _, loss in metrics["loss_by_position"]) / 63 == pytest.approx(metrics["loss"])


def test_documents_kept_apart_are_evaluated_as_if_each_were_alone(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("abcdefgh"[i % 5 :] * (i + 2))
    config = small(tmp_path, "data.separate=true", "data.held_out=0.5", "data.length=48")
    task = LanguageTask(config)
    model = task.build().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        metrics = task.evaluate(model)
        for batch in task.evaluation:
            bounds = batch["cu_seqlens"].tolist()
            for start, end in itertools.pairwise(bounds):
                alone = batch["input_ids"][:, start:end]
                if end - start > 1:
                    total += float(token_losses(model(alone, use_cache=False).logits[:, :-1], alone[:, 1:]).sum())
                    count += end - start - 1
    assert metrics["tokens"] == count
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_positions_restart_at_every_sequence():
    ids = torch.zeros(1, 9, dtype=torch.long)
    assert positions({"input_ids": ids}).tolist() == [list(range(9))]
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    assert positions({"input_ids": ids, "cu_seqlens": bounds}).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("separate", ["false", "true"])
def test_training_learns_the_text(text, tmp_path, separate):
    config = small(text, "train.steps=40", "train.warmup=4", "train.learning_rate=1e-2", f"data.separate={separate}")
    task = LanguageTask(config)
    model = task.build()
    done = train(model, task, config.train, tmp_path / "run")
    assert done.units == 40 * 2 * 64
    assert done.held_out["perplexity"] < 15 < 150 < 256


@pytest.mark.parametrize("edit", ["train.precision=bfloat16", "train.activation_checkpointing=block", "data.workers=1"])
def test_training_learns_under_other_settings_too(text, tmp_path, edit):
    config = small(text, "train.steps=15", "train.warmup=2", "train.learning_rate=1e-2", edit)
    task = LanguageTask(config)
    done = train(task.build(), task, config.train, tmp_path / "run")
    assert done.skipped == 0
    assert done.held_out["perplexity"] < 80


def test_the_seed_decides_the_weights(text):
    one, same, other = (LanguageTask(small(text, f"seed={seed}")).build() for seed in (1, 1, 2))
    first = next(iter(one.parameters()))
    assert torch.equal(first, next(iter(same.parameters())))
    assert not torch.equal(first, next(iter(other.parameters())))


def test_other_text_can_be_held_out_and_leaves_all_the_source_to_training(text, tmp_path):
    (tmp_path / "other.txt").write_text("zebra " * 100)
    task = LanguageTask(small(text, f"data.held_out_source={tmp_path / 'other.txt'}"))
    assert "zebra" in task.tokenizer.decode(task.evaluation[0]["input_ids"][0].tolist())
    assert list(task.documents.once()) == [text.read_text()]


def test_evaluation_alone_reads_no_training_text(text):
    task = LanguageTask(small(text), training=False)
    with pytest.raises(ValueError, match="training=False"):
        task.batches(None)


def test_bytes_per_token_follow_the_tokenizer(text, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<end>"]))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path / "bpe")
    task = LanguageTask(small(text, f"data.tokenizer={tmp_path / 'bpe'}"))
    assert 2 < task.bytes_per_token < 8
    model = task.build().eval()
    assert model.config.vocab_size == task.tokenizer.vocab_size
    with torch.no_grad():
        metrics = task.evaluate(model)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) / task.bytes_per_token)


def test_unknown_tasks_are_answered_with_the_nearest():
    assert open_task_module("language") is language
    with pytest.raises(ValueError, match=r"got 'langauge' \(did you mean 'language'\?\)"):
        open_task_module("langauge")


def test_what_is_saved_opens_in_transformers_and_again_here(text, tmp_path):
    from transformers import AutoTokenizer

    task = LanguageTask(small(text, "data.chat_template=plain"))
    model = task.build()
    task.save(model, tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved("zebra")["input_ids"] == list(b"zebra")
    messages = [{"role": "user", "content": "hi"}]
    assert saved.apply_chat_template(messages, tokenize=False) == "user: hi\n\n"
    opened, tokenizer = open_trained(tmp_path / "model")
    assert (tokenizer.vocab_size, tokenizer.end) == (256, 0)
    # half a pair of UTF-16 is no text, for either
    for words in ("Grüße, 世界 🎉", "a\ud800b"):
        assert tokenizer.encode(words).tolist() == task.tokenizer.encode(words).tolist()
    assert (opened.generation_config.eos_token_id, opened.generation_config.pad_token_id) == (0, 0)
    assert opened.model.embeddings.padding_idx is None
    # runs of before hold no tokenizer
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    assert isinstance(open_trained(tmp_path / "model")[1], Bytes)


def test_in_place_ttt_is_trained_from_scratch_saved_and_opened(text, tmp_path):
    config = small(text, "model.mixer=in_place", "train.steps=30", "train.warmup=3")
    task = LanguageTask(config)
    model = task.build()
    assert isinstance(model, InPlaceForCausalLM)
    assert model.config.chunk == 16
    done = train(model, task, config.train, tmp_path / "run")
    assert done.held_out["perplexity"] < 60
    assert task.flops(model) > 0
    task.save(model.eval(), tmp_path / "saved")
    again, tokenizer = open_trained(tmp_path / "saved")
    assert tokenizer.vocab_size == Bytes.vocab_size
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert again.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 43)


def test_in_place_ttt_refuses_what_it_has_no_way_for(text):
    with pytest.raises(ValueError, match=r"data.separate must be false where model.mixer is 'in_place'; got true"):
        LanguageTask(small(text, "model.mixer=in_place", "data.separate=true"))
    task = LanguageTask(small(text, "model.mixer=in_place"))
    batch, _ = next(task.batches(None))
    with pytest.raises(ValueError, match=r"train.parallel.sequence must be 1 where model.mixer is 'in_place'"):
        task.cut(batch, None)
    with pytest.raises(ValueError, match=r"model.mixer must be one of 'fast', 'in_place'; got 'softmax'"):
        small(text, "model.mixer=softmax")


def test_runs_from_before_there_were_mixers_keep_their_names(text):
    fast, in_place = (what_matters(small(text, *edits)) for edits in ([], ["model.mixer=in_place"]))
    assert "mixer" not in fast["model"]
    assert in_place["model"]["mixer"] == "in_place"


def test_a_pretrained_tokenizer_is_saved_with_what_generation_asks_for(text, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>", padding_side="right")
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path / "words")
    task = LanguageTask(small(text, f"data.tokenizer={tmp_path / 'words'}"))
    task.save(task.build(), tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (saved.padding_side, saved.pad_token_id, saved.chat_template) == ("left", 0, own.chat_template)


def test_a_chat_template_that_is_none_is_refused_before_any_text_is_read(text, tmp_path):
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}\n{{ message.content }}\n{% endif %}")
    with pytest.raises(ValueError, match=r"data\.chat_template must be a Jinja template .*broken\.jinja, line 3"):
        LanguageTask(small(text, f"data.chat_template={broken}"))
    with pytest.raises(ValueError, match=r"data\.chat_template must be 'plain' or a file"):
        LanguageTask(small(text, "data.chat_template=fancy"))
    broken.write_text("{{ messages[0]['content'] }}")
    assert LanguageTask(small(text, f"data.chat_template={broken}")).chat_template == broken.read_text()
