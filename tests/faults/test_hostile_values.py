"""States, scenes and configurations that somebody else has written: every field is checked, and the file is named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvbind
from kvbind import files
from kvbind.cli import main
from kvbind.inner import InnerLoop
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig, Scene
from kvbind.plan.calibration import read_points
from kvbind.tasks.language import LanguageConfig
from kvbind.train.config import load_config
from strategies import operands

SPEC = kvbind.systems.lact_llm(chunk=4).replace(retention=True)


def rewritten(source, target, edit):
    tensors = load_file(source)
    with files.safe_open(source, "pt") as file:
        facts = {name: json.loads(text) for name, text in file.metadata().items()}
    edit(tensors, facts)
    plain = {name: text if isinstance(text, str) else json.dumps(text) for name, text in facts.items()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, target, metadata=plain)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    o = operands(SPEC, batch=2, tokens=6)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    kvbind.ttt(SPEC, o.weights, o.q, o.k, o.v, **o.options)[1].save(path)
    return path


def tensor(name, change):
    return lambda tensors, facts: tensors.update({name: change(tensors[name])})


def fact(name, value):
    return lambda tensors, facts: facts.update({name: value})


def without(name):
    return lambda tensors, facts: tensors.pop(name)


def named(**fields):
    return lambda tensors, facts: facts["inner"].update(fields)


STATES = {
    "no fast weights": (without("weights.out"), r"'weights\.out' must have 4 axes; it is missing"),
    "no norms": (without("norms.gate"), r"lacks 'norms\.gate'"),
    "no rates": (without("pending.rates.up"), r"lacks 'pending\.rates\.up'"),
    "a tensor too many": (lambda tensors, _: tensors.update(x=torch.ones(1)), "has 'x'"),
    "another axis": (tensor("weights.gate", lambda x: x[0]), r"'weights\.gate' must have 4 axes"),
    "another width": (tensor("weights.up", lambda x: x[..., 1:]), r"'weights\.up' must be \[2, "),
    "another hidden width": (tensor("weights.out", lambda x: x[:, :, 1:]), r"'weights\.out' must be \[2, "),
    "other heads": (tensor("momentum.out", lambda x: x[:, :1]), r"'momentum\.out' must be \[2, "),
    "another batch": (tensor("weights.gate", lambda x: x[:1]), r"'weights\.gate' must be \[2, "),
    "another chunk": (tensor("pending.k", lambda x: x[:, :, 1:]), r"'pending\.k' must be \[2, "),
    "complex": (tensor("weights.gate", lambda x: x.to(torch.complex64)), "must be floating point"),
    "integers": (tensor("pending.retention", lambda x: x.to(torch.int32)), "must be floating point"),
    "two precisions": (tensor("momentum.out", lambda x: x.to(torch.bfloat16)), "all fast weights alike"),
    "lengths that are none": (fact("pending_lengths", 3), "pending_lengths must be a list"),
    "a length of text": (fact("pending_lengths", [2, "2"]), "integers from 0 to 3; got '2'"),
    "a negative length": (fact("pending_lengths", [2, -1]), "integers from 0 to 3; got -1"),
    "a length without places": (fact("pending_lengths", [2, 4]), "integers from 0 to 3; got 4"),
    "a sequence too many": (fact("pending_lengths", [2, 2, 2]), r"must be \[3, "),
    "a chunk of its own": (named(chunk=8), r"must be \[2, 2, 7"),
    "a rule of its own": (named(momentum=False), r"has 'momentum\."),
    "a field of its own": (named(speed=1), "no field 'speed'"),
    "deep JSON": (fact("inner", '{"network":' * 20_000), "at most 64 levels deep"),
    "no JSON": (fact("inner", "{"), "must be JSON"),
    "a list": (fact("inner", []), "needs a dict; got list"),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_state_is_refused(damage, state, tmp_path):
    edit, message = STATES[damage]
    rewritten(state, tmp_path / "other.safetensors", edit)
    with pytest.raises(ValueError, match=message) as refusal:
        kvbind.State.load(tmp_path / "other.safetensors")
    assert str(refusal.value).startswith("path must be a file that State.save wrote; ")
    assert "other.safetensors" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", kvbind.systems.SYSTEMS)
def test_states_of_all_systems_pass(name, tmp_path):
    spec = kvbind.systems.named(name)
    if spec.chunk is not None and spec.chunk > 4:
        spec = spec.replace(chunk=4)
    o = operands(spec, batch=2, tokens=9)
    after = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)[1]
    after.to(torch.bfloat16).save(tmp_path / "state.safetensors")
    assert kvbind.State.load(tmp_path / "state.safetensors").spec == spec


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    torch.manual_seed(0)
    model = LactNvs(LactNvsConfig(dim=16, layers=2, patch_size=4, head_dim=8, fast_head_dim=8))
    poses = torch.eye(4).expand(1, 2, 4, 4).clone()
    poses[:, 1, 0, 3] = 1
    path = tmp_path_factory.mktemp("scene") / "scene.safetensors"
    with torch.no_grad():
        model.reconstruct(torch.rand(1, 2, 3, 8, 8), poses, torch.tensor([8.0, 8, 4, 4]).expand(1, 2, 4)).save(path)
    return path


def about(**fields):
    return lambda tensors, facts: facts["scene"].update(fields)


def sized(**fields):
    return lambda tensors, facts: facts["architecture"].update(fields)


SCENES = {
    "no mark": (without("mark"), "mark must be finite float32 numbers .* it is missing"),
    "a mark that is no number": (tensor("mark", lambda x: x * float("nan")), "mark must be finite"),
    "another mark": (tensor("mark", lambda x: x[:, 1:]), "mark must be finite float32 numbers"),
    "no fast weights": (without("layers.1.weights.up"), r"'weights\.up' must have 4 axes; it is missing"),
    "other fast weights": (tensor("layers.0.weights.up", lambda x: x[:, 1:]), r"'weights\.up' must be"),
    "a layer too many": (lambda tensors, _: tensors.update({"layers.2.weights.up": torch.ones(1)}), "those of 2 layers"),
    "a tensor of no layer": (lambda tensors, _: tensors.update(x=torch.ones(1)), "those of 2 layers; got 'x'"),
    "a scene too many": (about(batch=2), "of a batch of 2 scenes"),
    "scenes of all memory": (about(batch=10**15), "of a batch of 1000000000000000 scenes"),
    "views of text": (about(views="2"), "views must be an int"),
    "no views": (about(views=0), "views must be an int of at least 1"),
    "a size of one side": (about(size=[8]), "size must be a height and a width"),
    "a size that patches do not tile": (about(size=[8, 9]), "size must be one that patches of 4"),
    "a layer too few": (lambda _, facts: facts["inner"].pop(), "inner must be a list of 2"),
    "another architecture": (sized(fast_head_dim=16), "must have 1 heads of width 16"),
    "sizes that do not divide": (sized(head_dim=7), "head_dim must divide dim"),
    "a size that is no number": (sized(dim=float("nan")), "must hold finite numbers"),
    "layers of all memory": (sized(layers=10**15), "inner must be a list of 1000000000000000"),
    "a field of its own": (sized(speed=1), "no field 'speed'"),
    "no architecture": (fact("architecture", []), "needs a dict"),
}


@pytest.mark.parametrize("damage", SCENES)
def test_a_damaged_scene_is_refused(damage, scene, tmp_path):
    edit, message = SCENES[damage]
    rewritten(scene, tmp_path / "other.safetensors", edit)
    with pytest.raises(ValueError, match=message) as refusal:
        Scene.load(tmp_path / "other.safetensors")
    assert str(refusal.value).startswith("path must be a file that Scene.save wrote; ")
    assert "\n" not in str(refusal.value)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{to}: &{to} [{','.join([f'*{by}'] * 10)}]" for by, to in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "\n".join(
    f"{to}: &{to} {{<<: [{','.join([f'*{by}'] * 10)}]}}" for by, to in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "a value that holds itself": ("&a {network: *a}", "a value that holds itself in line 1"),
    "deep lists": ("[" * 5_000, "more than 64 levels in line 1"),
    "aliases that expand": (BOMB, "more than 100000 values"),
    "merges that expand": (MERGES, "more than 100000 values"),
    "a key that is no text": ("1: 2", "a key that is no text, 1 in line 1"),
    "a key given twice": ("network: Linear\nnetwork: MLP", "given twice, 'network' in line 2"),
    "code": ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "bytes": ("a: !!binary aGk=", "must hold plain data; got a bytes"),
    "a date that is none": ("a: !!timestamp 2020-99-99", "month must be in"),
    "control characters": ("a: \0", "special characters are not allowed"),
    "no text": (b"\xff", "must be text in UTF-8"),
    "more than fits": ("a" * 2**21, "must have at most 1 MiB"),
}


@pytest.mark.parametrize("case", YAML)
def test_damaged_yaml_is_refused_in_one_line(case, tmp_path, capsys):
    content, message = YAML[case]
    path = tmp_path / "its.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: InnerLoop.from_yaml(path), lambda: load_config(LanguageConfig, path)):
        with pytest.raises(ValueError, match=message) as refusal:
            read()
        assert "its.yaml" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(SystemExit) as end:
        main(["explain", str(path)])
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_yaml_reads_numbers_and_anchors_as_people_mean_them():
    text = "a: 1e-5\nb: &b {x: 2E3, y: 2020-01-01}\nc:\n  <<: *b\n  x: -1.5e+2\nd: [*b, *b]"
    b = {"x": 2000.0, "y": "2020-01-01"}
    assert files.parse_yaml(text, "it") == {"a": 1e-5, "b": b, "c": b | {"x": -150.0}, "d": [b, b]}


def test_dicts_that_hold_themselves_are_refused():
    own = {"kind": "MLP"}
    own["activation"] = own
    twice = {}
    twice["network"] = twice["loss"] = twice
    for data in (own, twice, {"network": own, "chunk": 4}):
        with pytest.raises(ValueError, match="must be at most 64 levels deep"):
            InnerLoop.from_dict(data)
    with pytest.raises(ValueError, match="keys that are text; got 1"):
        InnerLoop.from_dict({"network": "Linear", 1: 2})
    with pytest.raises(ValueError, match="must hold finite numbers; got nan"):
        LactNvsConfig.from_dict({"base_lr": float("nan")})
    with pytest.raises(ValueError, match="triples of finite numbers"):
        kvbind.NewtonSchulz(coefficients=((1.0, 2.0, 10**400),))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"machine": {"device": "NVIDIA H100"}, "rows": [1], "config": {}}', '{"machine": 3, "rows": []}'],
)
def test_calibration_files_that_are_none_are_refused_by_name(content, tmp_path):
    (tmp_path / "its.json").write_text(content)
    with pytest.raises(ValueError, match=r"its\.json"):
        read_points(tmp_path / "its.json")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "", "a\0b", None, 3, "out", "loop"]
)
def test_names_that_leave_a_folder_are_refused(name, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "out").symlink_to(tmp_path / "x")
    (home / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="home"):
        files.inside(home, name)


def test_names_and_links_that_stay_are_followed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert files.inside(tmp_path, "b/c.png") == tmp_path / "b" / "c.png"


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for read in (files.read_json, files.read_tensors, files.read_pickled):
        with pytest.raises(ValueError, match=r"pipe\.json must be a file; it is none"):
            read(tmp_path / "pipe.json")
        with pytest.raises(ValueError, match="must be a file; it is a folder"):
            read(tmp_path)
