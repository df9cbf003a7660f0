"""Models, tokenizers and checkpoints that somebody else has made: refused in one line that names the file, and never run."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvbind.cli import main
from kvbind.models import PRESETS, LactConfig, LactForCausalLM
from kvbind.models.convert import convert
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.models.opening import open_exported
from kvbind.models.vittt import VitttConfig, VitttForImageClassification
from kvbind.tasks.tokenizers import open_tokenizer

SMALL = {**PRESETS["tiny"], "hidden_size": 32, "num_attn_heads": 2, "num_lact_heads": 1, "intermediate_size": 32}

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Code:
    """Whoever unpickles this makes a folder."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported") / "model"
    LactForCausalLM(LactConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    return shutil.copytree(exported, tmp_path / "model")


def config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def written(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def linked(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "secret.json")

    return change


def weights(edit):
    def change(folder):
        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def index(places):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))

    return change


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


EMBEDDINGS, NORM = "model.embeddings.weight", "model.norm.weight"

DAMAGES = {
    "deep JSON": (written("config.json", '{"a":' * 20_000), r"config\.json must be at most 64 levels deep"),
    "a cut configuration": (written("config.json", '{"model_type": '), r"config\.json must be JSON"),
    "a list": (written("config.json", "[]"), r"config\.json must hold a mapping"),
    "no text": (written("config.json", b"\xff\xfe{}"), r"config\.json must be text in UTF-8"),
    "a size that is no number": (config(hidden_size=float("nan")), r"config\.json must hold finite numbers"),
    "a number of 5000 digits": (written("config.json", '{"hidden_size": ' + "9" * 5000 + "}"), r"config\.json must be JSON"),
    "a size that is text": (config(hidden_size="wide"), "configuration of .*model must be of a LaCT language model"),
    "a size of all memory": (config(hidden_size=2**40), "configuration of .*model|do not fit its configuration"),
    "more layers than weights": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "more labels than names": (config(num_labels=10**9), "num_labels must be an int from 0 to 1000000; got 1000000000"),
    "a window of all numbers": (config(window_size=2**70), r"config\.json must hold whole numbers of 64 bits"),
    "a dtype that is none": (config(dtype="os.system"), "configuration of .*model must be of a La[cC][tT]"),
    "a network of no kind": (config(inner={"network": {"kind": []}, "chunk": 4}), r"network's kind must be .* got \[\]"),
    "a network without end": (
        config(inner={"network": {"kind": "MLP", "depth": 10**9}, "chunk": 4}),
        "depth must be at most",
    ),
    "an inner loop of lists": (config(inner=[[[]]]), "inner must be a kvbind.InnerLoop or its dict"),
    "a linked configuration": (linked("config.json"), r"config\.json must be a file inside .* to '.*secret\.json'"),
    "cut weights": (cut, r"model\.safetensors must be a safetensors file"),
    "no weights at all": (written(WEIGHTS, b""), r"model\.safetensors must be a safetensors file"),
    "a header of all memory": (written(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), r"must be a safetensors file"),
    "linked weights": (linked(WEIGHTS), r"model\.safetensors must be a file inside"),
    "complex weights": (
        weights(lambda held: held.update({NORM: held[NORM].to(torch.complex64)})),
        "norm.weight must be floating point; got",
    ),
    "integer weights": (
        weights(lambda held: held.update({NORM: held[NORM].to(torch.int8)})),
        "norm.weight must be floating point; got",
    ),
    "weights of another shape": (weights(lambda held: held.update({NORM: torch.ones(3)})), r"norm.weight must be \[32\]"),
    "missing weights": (weights(lambda held: held.pop(NORM)), r"missing \['model.norm.weight'\]"),
    "weights that no model has": (weights(lambda held: held.update({"x": torch.ones(1)})), r"not expected \['x'\]"),
    "an index that climbs": (index({EMBEDDINGS: "../secret.json"}), r"index\.json must name files inside .*'\.\./secret"),
    "an index from the root": (index({EMBEDDINGS: "/etc/passwd"}), r"index\.json must name files inside .*/etc/passwd"),
    "an index of another system": (index({EMBEDDINGS: "..\\secret.json"}), r"index\.json must name files inside"),
    "an index of numbers": (index({EMBEDDINGS: 1}), r"index\.json must have a weight_map"),
    "an index of nothing": (index([]), r"index\.json must have a weight_map"),
    "an index of files that are not there": (index({EMBEDDINGS: "a.safetensors"}), r"a\.safetensors"),
    "linked sampling": (linked("generation_config.json"), r"generation_config\.json must be a file inside"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(damage, folder, capsys):
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as refusal:
        open_exported(folder)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 2000
    with pytest.raises(SystemExit) as end:
        main(["generate", str(folder), "--tokenizer", "bytes"])
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def piped(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def indexed(metadata):
    def change(folder):
        LactForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        fields = json.loads((folder / INDEX).read_text()) | {"metadata": metadata}
        (folder / INDEX).write_text(json.dumps({name: x for name, x in fields.items() if x is not None}))

    return change


ADAPTER = "adapter_config.json"

FOR_TRANSFORMERS = {
    name: DAMAGES[name]
    for name in ("linked weights", "an index that climbs", "deep JSON", "cut weights", "more layers than weights",
                 "more labels than names", "a window of all numbers", "a dtype that is none", "a network of no kind",
                 "a number of 5000 digits")
} | {
    "as many layers as stall": (config(num_hidden_layers=10**5), "num_hidden_layers is 100000"),
    "a vocabulary of all memory": (config(vocab_size=2**62), "configuration of .*model must be of a LactForCausalLM"),
    "an index without metadata": (indexed(None), r"index\.json must have metadata, a mapping; got None"),
    "an index of listed metadata": (indexed([1]), r"index\.json must have metadata, a mapping; got \[1\]"),
    "an adapter that is a list": (written(ADAPTER, "[]"), r"adapter_config\.json must hold a mapping"),
    "an adapter that is none": (written(ADAPTER, "{"), r"adapter_config\.json must be JSON"),
    "an adapter of a number": (written(ADAPTER, '{"base_model_name_or_path": 5}'), "must name its base model by a text"),
    "a pipe for a configuration": (piped("config.json"), r"config\.json must be a file; it is none"),
    "a pipe for weights": (piped(WEIGHTS), r"model\.safetensors must be a file; it is none"),
    "a pipe for an adapter": (piped(ADAPTER), r"adapter_config\.json must be a file; it is none"),
    "a pipe for a template": (piped("chat_template.jinja"), r"chat_template\.jinja must be a file; it is none"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FOR_TRANSFORMERS)
def test_transformers_own_loading_looks_first(damage, folder):
    change, message = FOR_TRANSFORMERS[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        LactForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refusal.value)


def test_a_classifier_of_more_labels_than_names_is_refused(tmp_path):
    model = VitttForImageClassification(VitttConfig(embed_dim=16, depth=1, num_heads=2, patch_size=4, num_labels=3))
    model.save_pretrained(tmp_path)
    for fields in ({"num_labels": 10**9}, {"num_classes": 10**9}, {"num_labels": "many"}):
        config(**fields)(tmp_path)
        for opened in (open_exported, VitttForImageClassification.from_pretrained):
            with pytest.raises(ValueError, match="must be an int from 0 to 1000000"):
                opened(tmp_path)


def test_what_was_saved_is_read_in_one_file_or_several(exported, tmp_path):
    model = LactForCausalLM.from_pretrained(exported)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / INDEX).is_file()
    for folder in (exported, tmp_path / "parts"):
        ours = open_exported(folder)
        assert not ours.training
        assert ours.lm_head.weight is ours.model.embeddings.weight
        for name, x in model.state_dict().items():
            assert torch.equal(ours.state_dict()[name], x)


def test_links_of_the_hubs_cache_are_followed_and_no_others(exported, tmp_path):
    home = tmp_path / "models--them--model"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(exported.iterdir())):
        shutil.copy(path, home / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    open_exported(snapshot)
    LactForCausalLM.from_pretrained(snapshot)
    (tmp_path / "elsewhere").write_bytes((snapshot / WEIGHTS).read_bytes())
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leaves it"):
        open_exported(snapshot)


def test_pickles_code_and_other_models_in_a_folder_are_not_looked_at(folder, tmp_path):
    trace = tmp_path / "trace"
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    config(auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"})(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"}))
    torch.save(Code(trace), folder / "pytorch_model.bin")
    open_exported(folder)
    (folder / "adapter_config.json").unlink()
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"folder must hold model\.safetensors"):
        open_exported(folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LactForCausalLM.from_pretrained(folder)
    assert not trace.exists()


TOKENIZERS = {
    "a linked vocabulary": (linked("tokenizer.json"), r"tokenizer\.json must be a file inside"),
    "a linked configuration": (linked("tokenizer_config.json"), r"tokenizer_config\.json must be a file inside"),
    "a file that climbs": (
        written("tokenizer_config.json", json.dumps({"fast_tokenizer_files": ["../tokenizer.1.0.0.json"]})),
        r"tokenizer_config\.json must name files inside",
    ),
    "a file of this machine": (
        lambda folder: written("tokenizer_config.json", json.dumps({"vocab_file": str(folder.parent / "secret.json")}))(
            folder
        ),
        r"tokenizer_config\.json must name files inside",
    ),
    "deep JSON": (written("tokenizer_config.json", '{"a":' * 20_000), r"tokenizer_config\.json must be at most 64 levels"),
    "a vocabulary that is none": (written("tokenizer.json", "{"), "must be a tokenizer that transformers loads"),
    "its own code": (
        lambda folder: written("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["its.Own", None]}}))(
            folder
        ),
        "must be a tokenizer that transformers loads",
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(damage, tmp_path):
    change, message = TOKENIZERS[damage]
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "its.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trace')!r})")
    change(tmp_path / "words")
    with pytest.raises(ValueError, match=message) as refusal:
        open_tokenizer(str(tmp_path / "words"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "trace").exists()


def recursive():
    held = {}
    held["model"] = held
    return held


def repeated():
    return {"model": {EMBEDDINGS: torch.zeros(1).expand(2**40)}}


PICKLES = {
    "a dict that holds itself": (recursive, "must hold a state dict"),
    "integer keys": (lambda: {"model": {0: torch.ones(2)}}, "must hold parameters by name; got 0"),
    "text among weights": (lambda: {"model": {EMBEDDINGS: torch.ones(2), "x": "y"}}, "'x' is a str"),
    "sparse weights": (lambda: {"model": {EMBEDDINGS: torch.eye(2).to_sparse()}}, "must hold dense tensors"),
    "weights without numbers": (lambda: {"model": {EMBEDDINGS: torch.ones(2, device="meta")}}, "must hold dense tensors"),
    "weights larger than the file": (repeated, "must hold all numbers of a tensor"),
    "a list": (lambda: [torch.ones(2)], "must hold a state dict"),
}


@pytest.mark.parametrize("damage", PICKLES)
def test_a_damaged_checkpoint_is_not_converted(damage, tmp_path, capsys):
    make, message = PICKLES[damage]
    torch.save(make(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "mine")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "mine")])
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def refused_as_pickle(path, target):
    with pytest.raises(ValueError, match=f"{path.name} must be a file that torch.load reads safely") as refusal:
        convert(path, target)
    assert "\n" not in str(refusal.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": Code(tmp_path / "trace")}, tmp_path / "model.pt")
    refused_as_pickle(tmp_path / "model.pt", tmp_path / "mine")
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_that_expands_is_refused(tmp_path):
    torch.save({EMBEDDINGS: torch.zeros(2**18)}, tmp_path / "model.pt")
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    refused_as_pickle(tmp_path / "small.pt", tmp_path / "mine")


@pytest.mark.parametrize("length", [0, 1, 100, -200, -1])
def test_a_checkpoint_that_was_cut_is_refused(length, tmp_path):
    torch.save({EMBEDDINGS: torch.zeros(100)}, tmp_path / "whole.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:length])
    refused_as_pickle(tmp_path / "model.pt", tmp_path / "mine")


def released_views(block):
    def change(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        model = LactNvs(LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16))
        torch.save({"model": model.state_dict()}, folder / "model.pt")
        fields = {"patch_size": 4, "dim": 16, "layers": 1, "block_config": block}
        (folder / "config.yaml").write_text(json.dumps(fields))

    return change


def blocks(**fast):
    return [
        {"type": "model.SelfAttention", "length_dim": "l", "params": {"head_dim": 8}},
        {"type": "x.FastWeightGluMLPMultihead", "length_dim": "vl", "params": {"head_dim": 16, **fast}},
        {"type": "model.MLP", "length_dim": "vl"},
    ]


VIEWS = {
    "steps of all memory": (released_views(blocks(muon_update_steps=10**12)), "muon_update_steps must be an int of at most"),
    "steps that are text": (released_views(blocks(muon_update_steps="many")), "muon_update_steps must be an int"),
    "a width that is no number": (
        released_views(blocks(muon_update_steps=5, inter_multi=None)),
        "inter_multi must be a number",
    ),
    "modules that are none": (released_views([1, 2, 3]), "block_config must be a list of modules"),
    "a block that holds itself": (
        lambda folder: [released_views([])(folder), (folder / "config.yaml").write_text("&a {dim: *a}")],
        r"config\.yaml must be YAML: a value that holds itself in line 1",
    ),
}


@pytest.mark.parametrize("damage", VIEWS)
def test_a_released_configuration_is_checked(damage, folder, tmp_path):
    change, message = VIEWS[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        convert(folder, tmp_path / "mine")
    assert "\n" not in str(refusal.value)


def test_linked_files_are_not_copied_along(tmp_path, folder):
    linked("tokenizer.json")(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a file inside"):
        convert(folder, tmp_path / "mine", to="released")
    assert not (tmp_path / "mine").exists()
