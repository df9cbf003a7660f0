"""Inner loops as configurations write them: every named system from every preset, and edits of parts that are not there."""

from functools import partial

import pytest
import torch

from kvbind import Anchor, InnerLoop, Linear, NewtonSchulz, systems
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.models import PRESETS as LANGUAGE_SIZES
from kvbind.models.lact_nvs import LactNvs
from kvbind.tasks import TASKS, images, language, open_task_module
from kvbind.tasks.inner_loops import beneath, edited
from kvbind.tasks.views import config as views
from kvbind.train.config import load_config, read_config, to_yaml

EVERY = [(task, preset) for task in TASKS for preset in open_task_module(task).PRESETS]

OF_TASK = {
    "language": [name for name, make in systems.SYSTEMS.items() if make().visibility in ("past", "token")],
    "views": ["lact_nvs", "vittt", "zipmap", "tttlrm", "elastic_lact"],
    "images": ["vittt"],
}
OF_TASK["recall"] = OF_TASK["language"]


def read(task, preset, *edits):
    module = open_task_module(task)
    return read_config(module.Config, module.PRESETS, preset, edits)


def inner_of(task, model):
    return images.inner_loops(model)["heads"] if task == "images" else open_task_module(task).inner_loop(model)


def key(task):
    return "model.inner.heads" if task == "images" else "model.inner"


@pytest.mark.parametrize(("task", "preset"), EVERY)
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_system_runs_from_every_preset_as_itself_or_says_why_not(task, preset, name):
    config = read(task, preset, f"{key(task)}.system={name}")
    if name not in OF_TASK[task]:
        with pytest.raises(ValueError, match=rf"^system '{name}' does not run in this model: inner.* must "):
            inner_of(task, config.model)
        return
    found, named = inner_of(task, config.model), systems.named(name)
    # the machine's precision stays, and the chunk of the system that the size is made of
    if named.orthogonalize is not None:
        named = named.replace(orthogonalize=named.orthogonalize.replace(dtype=found.orthogonalize.dtype))
    if name == "lact_llm":
        named = named.replace(chunk=LANGUAGE_SIZES[config.model.size]["inner"].chunk)
    assert found == named


def test_the_presets_precision_stays_where_a_system_orthogonalizes():
    for task, name in (("language", "atlas"), ("language", "lact_llm"), ("views", "lact_nvs")):
        inner = inner_of(task, read(task, "tiny", f"model.inner.system={name}").model)
        assert inner.orthogonalize.dtype == torch.float32, name
    inner = inner_of(
        "language", read("language", "tiny", "model.inner.system=atlas", "model.inner.orthogonalize=null").model
    )
    assert inner.orthogonalize is None


def test_the_convolution_takes_its_own_system():
    config = read("images", "digits", "model.inner.conv.system=vittt_conv", "model.inner.conv.clip=false")
    assert images.inner_loops(config.model)["conv"] == systems.vittt("conv").replace(clip=False)
    with pytest.raises(ValueError, match=r"system 'vittt' does not run .*must be a DepthwiseConv"):
        images.inner_loops(read("images", "digits", "model.inner.conv.system=vittt").model)


@pytest.mark.parametrize("name", ["linear_attention", "titans", "ttt_linear"])
def test_a_run_that_is_edited_to_another_system_is_that_system(tmp_path, name):
    whole = language.resolve(read("language", "tiny", "model.inner.update=last", "model.inner.steps=2"))
    (tmp_path / "config.yaml").write_text(to_yaml(whole))
    load = partial(load_config, language.LanguageConfig, tmp_path / "config.yaml")
    assert language.inner_loop(load().model) == language.inner_loop(whole.model)
    assert language.inner_loop(load([f"model.inner.system={name}"]).model) == systems.named(name)


def test_further_edits_of_the_system_that_a_file_names_are_added_to_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {inner: {system: titans, refresh: 32, network: {kind: MLP, depth: 2}}}")
    load = partial(load_config, language.LanguageConfig, tmp_path / "mine.yaml")
    mine = systems.titans(chunk=32, depth=2)
    assert language.inner_loop(load(["model.inner.system=titans"]).model) == mine
    assert language.inner_loop(load(["model.inner.direction=ascent"]).model) == mine.replace(direction="ascent")
    # fields of the network that another kind replaces go with it
    assert language.inner_loop(load(["model.inner.network.kind=Linear"]).model) == mine.replace(network=Linear())
    assert language.inner_loop(load(["model.inner.network=Linear"]).model) == mine.replace(network=Linear())


@pytest.mark.parametrize("edit", [{"dtype": "float32"}, {"coefficients": [[1, 2, 3]]}, {}])
def test_an_edit_of_a_part_that_is_not_there_is_refused_by_name(edit):
    message = r"orthogonalize must not be edited by .* alone: system 'delta_net' has orthogonalize=None"
    with pytest.raises(ValueError, match=message):
        edited(systems.lact_llm(), {"system": "delta_net", "orthogonalize": edit})
    with pytest.raises(ValueError, match="the inner loop has orthogonalize=None"):
        edited(systems.delta_net(), {"orthogonalize": edit})


def test_a_user_who_edits_what_the_named_system_has_not_is_told():
    config = read("language", "tiny", "model.inner.orthogonalize.dtype=float32", "model.inner.system=titans")
    with pytest.raises(ValueError, match=r"by dtype alone: system 'titans' has orthogonalize=None"):
        language.inner_loop(config.model)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("NewtonSchulz", NewtonSchulz()),
        ({"kind": "NewtonSchulz", "dtype": "float32"}, NewtonSchulz(dtype=torch.float32)),
        (NewtonSchulz(((1, 2, 3),)).to_dict(), NewtonSchulz(((1, 2, 3),))),
    ],
)
def test_a_part_is_added_whole_or_by_its_kind(edit, expected):
    assert edited(systems.titans(), {"orthogonalize": edit}) == systems.titans().replace(orthogonalize=expected)
    assert InnerLoop.from_dict({**systems.titans().to_dict(), "orthogonalize": edit}).orthogonalize == expected


def test_an_unknown_kind_of_orthogonalization_is_named():
    with pytest.raises(ValueError, match=r"must be NewtonSchulz; got 'NewtonSchultz' \(did you mean 'NewtonSchulz'"):
        edited(systems.titans(), {"orthogonalize": "NewtonSchultz"})


@pytest.mark.parametrize("file", [None, {}, {"model": 3}, {"model": {"inner": None}}, {"model": {"inner": {"chunk": 8}}}])
def test_files_without_what_edits_replace_stay_as_they_are(file):
    for edits in ({}, {"model": {}}, {"model": {"inner": 3}}, {"model": {"inner": {"steps": 2}}}):
        assert beneath(file, edits) == file


@pytest.mark.parametrize("name", OF_TASK["language"])
def test_a_step_of_every_causal_system_trains(name):
    config = read(
        "language", "tiny", f"model.inner.system={name}", "model.fields.hidden_size=32", "model.fields.num_hidden_layers=1",
        "model.fields.window_size=16", "model.fields.intermediate_size=32",
    )  # fmt: skip
    from kvbind.tasks.tokenizers import open_tokenizer

    model = language.build_model(config, open_tokenizer("bytes"))
    assert all(layer.inner == language.inner_loop(config.model) for layer in model.model.layers)
    ids = torch.randint(256, (1, 72), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    mixer = model.model.layers[0].attn
    fast = mixer.get_parameter("w1" if isinstance(mixer, LactLayer) else "k_proj.weight").grad
    assert isinstance(mixer, FastWeightLayer) == (name in systems.PROJECTIONS)
    assert loss.isfinite()
    assert fast.isfinite().all()
    assert fast.abs().max() > 0


def test_view_synthesis_takes_chunks_and_anchors_as_edits():
    config = read("views", "tiny", "model.inner.chunk=64", "model.inner.anchor.strength=0.05")
    found = views.inner_loop(config.model)
    assert (found.chunk, found.anchor) == (64, Anchor(strength=0.05))
    again = views.inner_loop(views.resolve(config).model)
    assert again == found


def test_view_synthesis_is_built_of_the_named_system():
    config = read("views", "tiny", "model.inner.system=vittt")
    assert views.inner_loop(config.model) == systems.vittt()
    model = LactNvs(views.model_config(config.model))
    assert [mixer.inner for mixer in model.mixers] == [systems.vittt()] * 2
