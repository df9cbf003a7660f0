from dataclasses import dataclass, field

import pytest

from kvbind.train.config import (
    TrainConfig,
    config_hash,
    load_config,
    read_config,
    to_yaml,
    what_matters,
)


@dataclass
class Run:
    seed: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)


@pytest.fixture
def presets(tmp_path):
    (tmp_path / "fast.yaml").write_text("train: {steps: 7, learning_rate: 1.0e-2}")
    return {"fast": tmp_path / "fast.yaml"}


def test_overrides_win_over_the_preset_and_the_preset_over_defaults(presets):
    config = read_config(Run, presets, "fast", ["train.steps=8", "seed=3", "train.steps=9"])
    assert (config.seed, config.train.steps, config.train.learning_rate, config.train.clip) == (3, 9, 0.01, 1.0)


def test_a_yaml_file_serves_as_a_preset(presets):
    assert read_config(Run, {}, str(presets["fast"])).train.steps == 7


def test_a_saved_configuration_reads_back_the_same(presets, tmp_path):
    config = read_config(Run, presets, "fast", ["train.betas=[0.8,0.99]"])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(Run, tmp_path / "saved.yaml") == config
    assert load_config(Run, tmp_path / "saved.yaml", ["seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.lerning_rate=1"],
            r"no configuration key is named 'train\.lerning_rate' \(did you mean 'train\.learning_rate'\?\)",
        ),
        (["sed=1"], r"'sed' \(did you mean 'seed'\?\)"),
        (["trian.steps=1"], r"'trian' \(did you mean 'train'\?\)"),
        (["learning_rate=1"], r"'learning_rate' \(did you mean 'train\.learning_rate'\?\)"),
        (["train.lr=1"], r"no configuration key is named 'train\.lr'; train has steps, accumulate, learning_rate, "),
        (["train=1"], r"configuration key 'train' must be a mapping, of keys steps, "),
        (["train.betas=0.9"], r"'train\.betas' must be a list of 2, such as \[0\.9, 0\.95\]; got 0\.9"),
        (["train.betas=[1]"], r"'train\.betas' must be a list of 2, such as \[0\.9, 0\.95\]; got \[1\]"),
        (["seed=1", "train.betas=[a,b]"], r"'train\.betas' must be a list of 2, .*; got \['a', 'b'\]"),
        (["train.betas.0=1"], r"'train\.betas' must be a list of 2, .*; got \{'0': 1\}"),
        (["train.evaluate_at=[x]"], r"configuration key 'train\.evaluate_at\[0\]': .*'x'"),
        (["train.parallel=3"], r"'train\.parallel' must be a mapping, of keys strategy, .*; got 3"),
        (["train.=1"], r"must be key=value, .*got 'train\.=1'"),
        (["train.betas=[0.9,2]"], r"train\.betas must be at least 0 and below 1; got \(0\.9, 2\.0\)"),
        (["train.final=-1"], r"train\.final must be at least 0; got -1"),
        (["train.steps=many"], r"configuration key 'train\.steps' must be a whole number, such as \d+; got 'many'"),
        (["train.steps"], r"must be key=value, .*got 'train\.steps'"),
        (["train.steps=0"], r"train\.steps must be at least 1; got 0"),
        (["train.learning_rate=-1"], r"train\.learning_rate must be greater than 0; got -1"),
        (["train.learning_rate=.inf"], r"train\.learning_rate must be finite; got inf"),
        (["train.weight_decay=.inf"], r"train\.weight_decay must be finite; got inf"),
        (
            ["train.precision=float16"],
            r"train\.precision must be one of .*got 'float16' \(did you mean 'bfloat16'\?\)|got 'float16'",
        ),
    ],
)
def test_a_wrong_override_is_named(presets, overrides, message):
    with pytest.raises(ValueError, match=message):
        read_config(Run, presets, "fast", overrides)


def test_an_unknown_preset_is_answered_with_the_nearest(presets):
    with pytest.raises(ValueError, match=r"preset must be one of fast.*got 'fats' \(did you mean 'fast'\?\)"):
        read_config(Run, presets, "fats")


def test_a_preset_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_config(Run, {}, str(tmp_path / "list.yaml"))


def test_a_preset_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("train: [")
    with pytest.raises(ValueError, match=r"broken\.yaml must be YAML: "):
        read_config(Run, {}, str(tmp_path / "broken.yaml"))


def test_the_hash_goes_by_what_the_result_depends_on():
    base = config_hash(what_matters(Run()))
    assert config_hash(what_matters(Run(train=TrainConfig(keep=5, device="cpu", checkpoint_every=3)))) == base
    assert config_hash(what_matters(Run(seed=1))) != base
    assert config_hash(what_matters(Run(train=TrainConfig(steps=2)))) != base


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "a ${train.steps} b", "[1, '${oc.env:SECRET}']"])
def test_a_value_that_stands_for_another_is_refused_and_nothing_of_it_is_saved(presets, tmp_path, monkeypatch, value):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(
        ValueError, match=r"configuration key '(train\.)?\w+(\.1)?' must be a value, not an interpolation; got"
    ):
        read_config(Run, presets, "fast", [f"train.device={value}"])
    path = tmp_path / "own.yaml"
    path.write_text(f'train: {{precision: "{value}"}}' if not value.startswith("[") else f"train: {{betas: {value}}}")
    with pytest.raises(ValueError, match="not an interpolation") as caught:
        read_config(Run, {}, str(path))
    assert "hunter2" not in str(caught.value)


def test_a_value_that_is_missing_is_refused_by_name(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text('train: {device: "???"}')
    with pytest.raises(ValueError, match=r"configuration key train\.device must have a value"):
        read_config(Run, {}, str(path))


@pytest.mark.parametrize("name", ["weight_decay", "final", "checkpoint_minutes", "learning_rate", "clip"])
def test_numbers_of_a_run_are_numbers(name):
    with pytest.raises(ValueError, match=rf"train\.{name} must be"):
        TrainConfig(**{name: float("nan")})
