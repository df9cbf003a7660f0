"""Folders of models as transformers opens them: tokenizers, image processors, pipelines, code beside a model."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lact_small import small_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    TextStreamer,
    pipeline,
)

import kvbind.models.lact
from kvbind.models import LactConfig, LactForCausalLM
from kvbind.models.auto import HOMES, MODULE
from kvbind.models.vittt import VitttConfig, VitttForImageClassification, VitttImageProcessor
from kvbind.tasks.images.augment import ReadEvaluation, normalized
from kvbind.tasks.tokenizers import PLAIN_CHAT, Bytes


def opens_processors():
    """Whether transformers' Auto class of image processors is there, which some versions have with torchvision alone."""
    try:
        AutoImageProcessor.register  # noqa: B018
    except ImportError:
        return False
    return True


NAMES = {0: "cat", 1: "dog", 2: "newt"}


def classifier():
    torch.manual_seed(0)
    config = VitttConfig(8, 1, 2, 4, img_size=8, num_labels=3, id2label=NAMES, initializer_range=0.3)
    return VitttForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a language model of bytes and of a classifier, as their tasks write them."""
    home = tmp_path_factory.mktemp("models")
    language = small_model(vocab_size=256, pad_token_id=None, eos_token_id=0, initializer_range=0.3)
    language.generation_config.pad_token_id = 0
    language.save_pretrained(home / "language")
    tokenizer = Bytes().for_transformers()
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(home / "language")
    classifier().save_pretrained(home / "images")
    VitttImageProcessor(8, 3, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 0.8).save_pretrained(home / "images")
    return home


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders / "language")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_saved_tokenizer_has_the_ids_of_bytes(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == Bytes().encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("\0", "")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=24))
def test_what_a_model_generates_decodes_as_bytes_do(tokenizer, drawn):
    assert tokenizer.decode(list(drawn)) == Bytes().decode(list(drawn))


def test_the_saved_tokenizer_ends_and_pads_as_generation_asks(tokenizer):
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (256, 0, 0, "left")
    assert tokenizer(["ab", "c"], padding=True)["input_ids"] == [[97, 98], [0, 99]]
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert bytes(ids).decode() == "user: hi\n\nassistant: "


def test_pipelines_generate_text(folders, capsys):
    generate = pipeline("text-generation", model=str(folders / "language"))
    options = {"max_new_tokens": 6, "do_sample": False}
    (found,) = generate("def f", **options)
    ids = torch.tensor([list(b"def f")])
    expected = generate.model.generate(ids, **options)[0].tolist()
    assert found["generated_text"] == generate.tokenizer.decode(expected, skip_special_tokens=True)
    # rows of different lengths are padded at the left, and chats are written out
    batch = generate(["def f", "x"], batch_size=2, **options)
    assert batch[0][0]["generated_text"] == found["generated_text"]
    (chat,) = generate([{"role": "user", "content": "hi"}], **options)
    assert chat["generated_text"][-1]["role"] == "assistant"
    generate.model.generate(ids, streamer=TextStreamer(generate.tokenizer, skip_special_tokens=True), **options)
    assert capsys.readouterr().out.strip() == found["generated_text"].strip()


def test_a_string_stops_generation(folders, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folders / "language")
    ids = torch.tensor([list(b"def f(x): return")])
    whole = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    place = next(i for i in range(2, len(whole)) if 32 <= whole[i] < 127 and whole[i] not in whole[:i])
    stopped = model.generate(ids, max_new_tokens=24, do_sample=False, tokenizer=tokenizer, stop_strings=[chr(whole[place])])
    assert stopped[0, ids.shape[1] :].tolist() == whole[: place + 1]


def picture(mode, size=(20, 12)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_processor_sees_what_evaluation_sees(mode, channels):
    from kvbind.models.pictures import on_white

    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.3, 0.4][:channels]
    image = picture(mode)
    read = ReadEvaluation(8, 0.8)(on_white(image).convert("L" if channels == 1 else "RGB"), (0,))
    pixels = torch.from_numpy(np.asarray(read).reshape(8, 8, channels).transpose(2, 0, 1).copy())
    found = VitttImageProcessor(8, channels, mean, std, 0.8)([image, image], return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, normalized(pixels[None].expand(2, -1, -1, -1), mean, std))


def test_the_image_processor_takes_arrays_and_refuses_what_it_cannot_know():
    image, processor = picture("RGB"), VitttImageProcessor(8)
    expected = processor(image, return_tensors="np")["pixel_values"]
    array = np.asarray(image)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), [image]):
        np.testing.assert_array_equal(processor(same, return_tensors="np")["pixel_values"], expected)
    assert processor(image, return_tensors="pt", size={"height": 16, "width": 16})["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="uint8 arrays"):
        processor(array / 255.0)
    for shape in ([10, 10, 2], [0, 0, 3]):
        with pytest.raises(ValueError, match=f"got shape {re.escape(str(shape))}"):
            processor([np.zeros(shape, np.uint8)])
    with pytest.raises(TypeError, match="got do_resize"):
        processor(image, do_resize=False)
    refused = {
        "size must be": {"size": {"shortest_edge": 8}},
        "num_channels must be": {"num_channels": 2},
        "image_mean must hold": {"image_mean": [0.5]},
        "image_std must be": {"image_std": [0.0, 1, 1]},
        "crop_pct must be": {"crop_pct": 1.5},
    }
    for message, fields in refused.items():
        with pytest.raises(ValueError, match=message):
            VitttImageProcessor(**fields)


@pytest.mark.skipif(not opens_processors(), reason="AutoImageProcessor needs torchvision in this transformers")
def test_pipelines_classify_pictures(folders, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether to run code"))
    classify = pipeline("image-classification", model=str(folders / "images"))
    image = picture("RGB")
    found = classify(image)
    assert {x["label"] for x in found} == set(NAMES.values())
    pixels = AutoImageProcessor.from_pretrained(folders / "images")(image, return_tensors="pt")["pixel_values"]
    scores = classifier()(pixels).logits.softmax(-1)[0]
    assert {x["label"]: x["score"] for x in found} == pytest.approx(
        dict(zip(NAMES.values(), scores.tolist(), strict=True)), abs=1e-5
    )


def test_pipelines_take_the_processor_itself(folders):
    from transformers import ImageClassificationPipeline

    processor = VitttImageProcessor.from_pretrained(folders / "images")
    assert (processor.size, processor.crop_pct) == ({"height": 8, "width": 8}, 0.8)
    found = ImageClassificationPipeline(model=classifier(), image_processor=processor)(picture("RGB"))
    assert {x["label"] for x in found} == set(NAMES.values())


def test_what_is_written_names_the_classes_that_its_file_imports(folders):
    from kvbind.models.in_place import InPlaceConfig

    InPlaceConfig(LlamaConfig(num_hidden_layers=1)).save_pretrained(folders / "in_place")
    for folder, home in zip(("in_place", "language", "images"), HOMES, strict=True):
        text = (folders / folder / f"{MODULE}.py").read_text()
        named = json.loads((folders / folder / "config.json").read_text())["auto_map"]
        assert named == {auto: f"{MODULE}.{name}" for auto, name in HOMES[home].items()}
        scope = {}
        exec(text, scope)
        assert sorted(scope["__all__"]) == sorted(HOMES[home].values())
        assert all(scope[name] is getattr(sys.modules[home], name) for name in scope["__all__"])


def test_a_class_of_ones_own_is_copied_and_named_and_ours_are_not(folders, tmp_path):
    config = AutoConfig.from_pretrained(folders / "language", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folders / "language", trust_remote_code=True)
    assert (type(config), type(model)) == (LactConfig, LactForCausalLM)
    model.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == [f"{MODULE}.py"]
    # a configuration alone, elsewhere, writes no file
    config.to_json_file(tmp_path / "described.json")
    assert not list(tmp_path.glob("*.py"))

    (tmp_path / "mine.py").write_text("from kvbind.models import LactForCausalLM\nclass Mine(LactForCausalLM): pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import mine
    finally:
        sys.path.remove(str(tmp_path))
    mine.Mine.register_for_auto_class("AutoModelForCausalLM")
    mine.Mine(config).save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["auto_map"] == {
        "AutoConfig": f"{MODULE}.LactConfig",
        "AutoModel": f"{MODULE}.LactModel",
        "AutoModelForCausalLM": "mine.Mine",
    }
    assert sorted(path.name for path in (tmp_path / "own").glob("*.py")) == [f"{MODULE}.py", "mine.py"]


def test_a_process_that_never_imported_kvbind_opens_them(folders, tmp_path):
    script = """
        import sys
        from transformers import AutoConfig, AutoTokenizer, pipeline
        language, images = sys.argv[1:]
        assert AutoTokenizer.from_pretrained(language).eos_token_id == 0
        try:
            AutoConfig.from_pretrained(language)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error)
        else:
            raise AssertionError("code was run without leave")
        assert "kvbind" not in sys.modules
        text = pipeline("text-generation", model=language, trust_remote_code=True)
        print(len(text("def f", max_new_tokens=2, do_sample=False)))
        print(type(text.model).__module__)
        if images:
            pictures = pipeline("image-classification", model=images, trust_remote_code=True)
            print(type(pictures.image_processor).__name__)
    """
    images = folders / "images" if opens_processors() else ""
    home = {**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), folders / "language", images],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=home, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    processor = "VitttImageProcessor\n" if opens_processors() else ""
    assert done.stdout.endswith(f"1\nkvbind.models.lact.model\n{processor}")


def test_the_cache_is_a_tree_of_its_tensors():
    from torch.utils import _pytree as pytree

    model = small_model().double()
    ids = torch.randint(1, 61, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = kvbind.models.lact.LactCache()
        model(ids[:, :13], cache=cache)
        leaves, shape = pytree.tree_flatten(cache)
        assert all(isinstance(x, torch.Tensor) for x in leaves)
        copy = pytree.tree_unflatten([x.clone() for x in leaves], shape)
        assert (copy.seen, copy.columns, len(copy)) == (cache.seen, cache.columns, len(cache))
        for held in (copy, pytree.tree_map(lambda x: x, cache)):
            torch.testing.assert_close(model(ids[:, 13:], cache=held).logits, whole[:, 13:], rtol=0, atol=1e-10)
        empty = pytree.tree_map(lambda x: x, kvbind.models.lact.LactCache())
        assert (len(empty), empty.columns) == (0, 0)
