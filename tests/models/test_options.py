"""Options that configurations inherit from transformers: heeded as transformers' models heed them, or refused."""

import logging

import pytest
import torch
import torch.nn.functional as F
from lact_small import small_config, small_model, tokens
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BatchFeature,
    ImageClassificationPipeline,
    PretrainedConfig,
)

from kvbind.models import LactConfig, LactForCausalLM, LactModel
from kvbind.models.vittt import VitttConfig, VitttForImageClassification

IDS = tokens(2, 9)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4, "img_size": 8, "initializer_range": 0.3}


def image_config(**fields):
    return VitttConfig(**{**SIZES, "num_labels": 3, **fields})


def classifier(**fields):
    torch.manual_seed(0)
    return VitttForImageClassification(image_config(**fields)).eval()


REFUSED = {
    "output_attentions": True,
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True,
    "per_layer_config": {0: {"initializer_range": 0.1}},
    "tie_last_hidden_states": False,
    "experts_implementation": "grouped_mm",
    "attn_implementation": "flash_attention_2",
    # of earlier versions, or of other models
    "pruned_heads": {0: [1]},
    "is_decoder": True,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 8,
    "tie_encoder_decoder": True,
    "torchscript": True,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "layer_types": ["full_attention"],
    "gradient_checkpointing": True,
    "use_bfloat16": True,
    # settings of generation
    "temperature": 0.5,
    "num_beams": 4,
    "max_new_tokens": 5,
    "repetition_penalty": 1.2,
    "no_such_option": 1,
}
BUILD = {"language": small_config, "images": image_config}


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_do_nothing_is_refused_by_name(name, family):
    with pytest.raises(ValueError, match=name):
        BUILD[family](**{name: REFUSED[name]})


def test_options_of_one_family_are_refused_by_the_other():
    for name in ("eager", "flex_attention"):
        with pytest.raises(ValueError, match="attn_implementation must be 'sdpa'"):
            small_config(attn_implementation=name)
    with pytest.raises(ValueError, match="attn_implementation must be None"):
        image_config(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="tie_word_embeddings must be False"):
        image_config(tie_word_embeddings=True)


def test_options_edited_afterwards_are_refused_by_the_model():
    for config, model in ((small_config(), LactForCausalLM), (small_config(), LactModel)):
        config.chunk_size_feed_forward = 4
        with pytest.raises(ValueError, match="chunk_size_feed_forward must be 0"):
            model(config)
    config = small_config()
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="attn_implementation must be 'sdpa'"):
        LactForCausalLM(config)
    config = image_config()
    config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="is_encoder_decoder must be False"):
        VitttForImageClassification(config)
    config = image_config()
    # past the check that some versions of transformers make themselves
    config.__dict__["problem_type"] = "guessing"
    with pytest.raises(ValueError, match="problem_type must be one of"):
        VitttForImageClassification(config)(IMAGE, labels=torch.zeros(2, dtype=torch.long))


def test_attention_cannot_be_chosen_later():
    model = small_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation must be 'sdpa'"):
        model.set_attn_implementation("eager")
    model.config.output_attentions = False
    with pytest.raises(ValueError, match="output_attentions must not be set"):
        model(IDS, output_attentions=True)


def test_what_every_configuration_lists_is_heeded_or_refused():
    # fails where transformers adds an option, which then belongs into one of the tests here
    heeded = {"output_hidden_states", "return_dict", "dtype", "id2label", "label2id", "problem_type"}
    facts = {"transformers_version", "architectures", "_name_or_path", "model_type"}
    assert set(PretrainedConfig().to_dict()) <= heeded | facts | REFUSED.keys()


@pytest.mark.parametrize("family", BUILD)
def test_harmless_values_are_taken(family):
    config = BUILD[family](output_attentions=False, chunk_size_feed_forward=0, is_encoder_decoder=False, temperature=1.0)
    assert not hasattr(config, "temperature")


def test_hidden_states_and_tuples_come_as_the_configuration_says(tmp_path):
    model = small_model(output_hidden_states=True)
    output = model(IDS)
    assert len(output.hidden_states) == 3
    assert model(IDS, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    assert model(IDS).hidden_states is None
    model.config.return_dict = False
    found = model(IDS, labels=IDS)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[1], output.logits)
    assert isinstance(model.model(IDS), tuple)
    assert model(IDS, return_dict=True).logits is not None

    model = classifier(output_hidden_states=True)
    assert len(model(IMAGE).hidden_states) == 1
    assert model(IMAGE, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(IMAGE), tuple)
    model.save_pretrained(tmp_path)
    assert VitttConfig.from_pretrained(tmp_path).output_hidden_states


def test_models_are_made_in_the_dtype_of_their_configuration():
    for auto, config in (
        (AutoModelForCausalLM, small_config(dtype="bfloat16")),
        (AutoModelForImageClassification, image_config(dtype="bfloat16")),
    ):
        assert {p.dtype for p in auto.from_config(config).parameters()} == {torch.bfloat16}


def test_labels_have_the_names_of_the_configuration(tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl", 3: "ant"}
    model = classifier(num_labels=4, id2label=names, label2id={name: i for i, name in names.items()})
    assert model(IMAGE).logits.shape == (2, 4)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert again.id2label == names
    assert again.label2id["owl"] == 2
    # a language model keeps them for a head of its user's own
    assert small_config(num_labels=5, problem_type="regression").num_labels == 5


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", "single_label_classification", None])
def test_a_classifiers_loss_is_that_of_its_problem(problem):
    model = classifier(problem_type=problem)
    chosen, several, numbers = torch.tensor([2, 0]), torch.tensor([[1.0, 0, 1], [0, 0, 0]]), torch.randn(2, 3)
    logits = model(IMAGE).logits
    if problem == "multi_label_classification":
        for labels in (several, several.long()):
            torch.testing.assert_close(model(IMAGE, labels=labels).loss, F.binary_cross_entropy_with_logits(logits, several))
    elif problem == "regression":
        torch.testing.assert_close(model(IMAGE, labels=numbers).loss, F.mse_loss(logits, numbers))
    else:
        torch.testing.assert_close(model(IMAGE, labels=chosen).loss, F.cross_entropy(logits, chosen))
        soft = numbers.softmax(-1)
        torch.testing.assert_close(model(IMAGE, labels=soft).loss, F.cross_entropy(logits, soft))
    model(IMAGE, labels=numbers).loss.backward()
    with pytest.raises(ValueError, match="labels must be"):
        model(IMAGE, labels=torch.zeros(2, 2))
    if problem in ("multi_label_classification", "regression"):
        with pytest.raises(ValueError, match=r"labels must be \[2, 3\]"):
            model(IMAGE, labels=chosen)


def test_one_label_is_regression():
    model, labels = classifier(num_labels=1), torch.tensor([0.3, -1.0])
    expected = F.mse_loss(model(IMAGE).logits[:, 0], labels)
    torch.testing.assert_close(model(IMAGE, labels=labels).loss, expected)
    torch.testing.assert_close(model(IMAGE, labels=labels[:, None]).loss, expected)
    torch.testing.assert_close(
        model(IMAGE[:1], labels=labels[:1]).loss, F.mse_loss(model(IMAGE[:1]).logits[:, 0], labels[:1])
    )
    with pytest.raises(ValueError, match="problem_type"):
        image_config(num_labels=1, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="problem_type"):
        image_config(problem_type="guessing")


def test_a_loss_function_put_on_a_model_is_its_loss():
    model, seen = small_model(), {}

    def own(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, vocab_size=vocab_size)
        return logits.square().mean() + labels.sum() * 0

    model.loss_function = own
    output = model(IDS, labels=IDS, num_items_in_batch=7)
    torch.testing.assert_close(output.loss, output.logits.square().mean())
    assert seen == {"vocab_size": 61, "num_items_in_batch": 7}
    model = classifier()
    model.loss_function = lambda labels, logits, config: logits.sum() * config.num_labels
    output = model(IMAGE, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.loss, 3 * output.logits.sum())
    # transformers' own, which classes by other names find too
    assert type("Mine", (LactForCausalLM,), {})(small_config()).loss_function.__name__ == "ForCausalLMLoss"
    assert type("Mine", (VitttForImageClassification,), {})(image_config()).loss_type == "ForImageClassification"


def test_checkpointing_is_as_its_user_asked():
    model, calls = classifier().train(), []
    expected = torch.autograd.grad(model(IMAGE).logits.sum(), model.vittt.blocks[0].attn.w1)

    def contexts():
        calls.append("forward")
        return torch.autograd.graph.save_on_cpu(), torch.autograd.graph.save_on_cpu()

    for given in ({"use_reentrant": True}, {"use_reentrant": False, "context_fn": contexts}):
        model.zero_grad()
        model._set_gradient_checkpointing(
            True, lambda f, *args, given=given: torch.utils.checkpoint.checkpoint(f, *args, **given)
        )
        model(IMAGE).logits.sum().backward()
        torch.testing.assert_close(model.vittt.blocks[0].attn.w1.grad, expected[0])
    assert calls == ["forward"]


def test_pipelines_know_the_classes(caplog):
    def processor(images, **kwargs):
        return BatchFeature({"pixel_values": IMAGE[:1]})

    with caplog.at_level(logging.ERROR, "transformers"):
        found = ImageClassificationPipeline(model=classifier(), image_processor=processor)(Image.new("RGB", (20, 10)))
    assert {x["label"] for x in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert not caplog.records


def test_configurations_read_what_they_wrote(tmp_path):
    for config in (small_config(), image_config(problem_type="regression")):
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict() | {"transformers_version": again.transformers_version}
    assert LactConfig.from_dict(small_config().to_dict()).inner == small_config().inner


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 0), ("intermediate_size", -5), ("base_lr", "x"), ("norm_eps", "a"), ("rope_theta", float("inf")),
     ("inter_multi", 0), ("window_size", 2.5)],
)  # fmt: skip
def test_sizes_and_rates_of_a_configuration_are_refused_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=f"{field} must be"):
        LactConfig(**{field: value})
