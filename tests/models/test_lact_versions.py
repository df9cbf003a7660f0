"""The language model under each transformers that it is tested with: what they name differently, and what they refuse."""

import importlib
import logging
import pathlib
import re
import tomllib
import warnings

import pytest
import torch
import transformers
from lact_small import cache_of, small_model, tokens, word_tokenizer

from checkpointing import enable_checkpointing
from kvbind.models.lact.cache import CACHE, CACHE_NAMES, LactCache
from kvbind.models.lact.supported import TRANSFORMERS

OTHER_NAME = next(name for name in CACHE_NAMES if name != CACHE)
PYPROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def deprecations():
    """Warnings, and what transformers logs in place of some, that call something deprecated; its "once" counts anew."""
    transformers.utils.logging.warning_once.cache_clear()
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = lambda: [text for text in (*logged, *(str(w.message) for w in warned)) if "deprecated" in text]  # noqa: E731
        yield found
    logger.removeHandler(handler)


def test_the_cache_goes_in_and_out_under_the_name_that_transformers_gives_it(deprecations):
    model = small_model().double()
    ids = tokens(2, 21)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        output = model(ids[:, :13])
        assert set(output) == {"logits", CACHE}
        assert isinstance(output[CACHE], LactCache)
        rest = model(ids[:, 13:], **{CACHE: output[CACHE]})
        torch.testing.assert_close(rest.logits, whole[:, 13:], rtol=0, atol=1e-10)
        assert isinstance(getattr(model.model(ids), CACHE), LactCache)
    options = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
    first = model.generate(ids, **options)
    whole = torch.ones_like(first.sequences)
    second = model.generate(first.sequences, attention_mask=whole, **{CACHE: cache_of(first)}, **options)
    assert torch.equal(second.sequences, model.generate(ids, do_sample=False, max_new_tokens=10))
    assert CACHE in model._skip_keys_device_placement
    assert CACHE in model.config.keys_to_ignore_at_inference
    assert deprecations() == []


def test_either_name_of_the_cache_is_taken_by_the_model(deprecations):
    model = small_model()
    with torch.no_grad():
        for part in (model, model.model):
            caches = {name: LactCache() for name in CACHE_NAMES}
            for name, cache in caches.items():
                part(tokens(1, 9), **{name: cache})
                assert cache.seen == (9,)
                with pytest.raises(TypeError, match=f"^{name} must be a kvbind LactCache"):
                    part(tokens(1, 9), **{name: transformers.DynamicCache()})
            with pytest.raises(ValueError, match="cache must be None beside past_key_values"):
                part(tokens(1, 9), **caches)
    assert deprecations() == []


def test_generate_refuses_or_renames_the_other_name_of_the_cache():
    model, cache = small_model(), LactCache()
    ids = tokens(1, 9)
    model(ids, cache=cache)
    expected = model.generate(torch.cat([ids, ids], 1), do_sample=False, max_new_tokens=4)
    renamed = CACHE == "cache"
    with pytest.warns(FutureWarning, match="cache") if renamed else pytest.raises(ValueError, match="'cache'"):
        got = model.generate(torch.cat([ids, ids], 1), do_sample=False, max_new_tokens=4, **{OTHER_NAME: cache})
    assert not renamed or torch.equal(got, expected)


def test_training_and_generating_with_checkpoints_is_free_of_deprecated_calls(deprecations):
    model = small_model().train()
    enable_checkpointing(model)
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=2, num_beams=2)
    assert deprecations() == []


def test_arguments_that_belong_to_generation_are_taken_and_change_nothing():
    model = small_model(vocab_size=27)
    tokenizer = word_tokenizer()
    ids = torch.randint(1, 27, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        given = {"cache_position": torch.arange(9), "tokenizer": tokenizer, "stop_strings": ["a"]}
        assert torch.equal(model(ids, **given).logits, expected)
    plain = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=12, tokenizer=tokenizer), plain)
    stop = tokenizer.decode(plain[0, 12])
    stopped = model.generate(ids, do_sample=False, max_new_tokens=12, tokenizer=tokenizer, stop_strings=[stop])
    first = 9 + plain[0, 9:].tolist().index(int(plain[0, 12]))
    assert torch.equal(stopped, plain[:, : first + 1])


def test_logits_are_kept_where_they_are_asked_for():
    model = small_model()
    ids = tokens(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3] = mask[1, 4] = mask[1, 8] = True
    where = torch.tensor([[0, 5], [7, 2]])
    with torch.no_grad():
        every = model(ids).logits
        kept = {"last": 2, "all": 0, "these": torch.tensor([4, 1]), "by row": where, "masked": mask}
        got = {name: model(ids, logits_to_keep=value).logits for name, value in kept.items()}
    expected = {
        "last": every[:, -2:],
        "all": every,
        "these": every[:, [4, 1]],
        "by row": torch.stack([every[0, [0, 5]], every[1, [7, 2]]]),
        "masked": every[mask],
    }
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", ["4.57.6", "5.15.1", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_another_transformers_is_refused_with_those_that_work(version, monkeypatch):
    module = importlib.import_module("kvbind.models.lact")
    # by name, as transformers exchanges its own entry in sys.modules while it is imported
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=re.escape(f"transformers >=5.16,<5.25, and {version} is installed")):
        importlib.reload(module)


def test_the_versions_that_are_taken_are_those_that_are_installed():
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert f"transformers{TRANSFORMERS}" in dependencies
