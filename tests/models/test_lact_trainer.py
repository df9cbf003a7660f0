"""transformers' own Trainer on the LaCT language model."""

import pytest
import torch
from lact_small import LADDER, small_config, small_model, tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvbind.models import LactForCausalLM
from kvbind.models.vittt import VitttConfig, VitttForImageClassification
from kvbind.train import graph_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


@pytest.mark.parametrize("collate", ["padded", "flattened"])
def test_trainer_trains_two_steps_and_evaluates(tmp_path, collate):
    model = small_model(LADDER["rung2"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in (tokens(1, 12 + i, seed=i)[0].tolist() for i in range(8))]

    def pad(rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            logging_steps=1,
            save_steps=2,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=pad if collate == "padded" else transformers.DataCollatorWithFlattening(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    # the loss is a mean over predicted tokens, also where several batches make one step
    assert 0.8 < losses[0] / torch.log(torch.tensor(61.0)).item() < 1.2
    assert any((p - before[name]).abs().max() > 1e-3 for name, p in model.named_parameters())
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, p in model.named_parameters():
        assert torch.equal(again.state_dict()[name], p)


def smoothing_loss(model, inputs, tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    return transformers.Trainer(model=model, args=arguments).compute_loss(model, dict(inputs))


class Derived(LactForCausalLM):
    pass


# what PEFT asks of transformers by a deprecated name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["itself", "derived", "wrapped", "adapted"])
def test_label_smoothing_smooths_the_next_token(tmp_path, kind):
    model = small_model(LADDER["rung2"])
    if kind == "derived":
        model.__class__ = Derived
    elif kind == "wrapped":
        # as FSDP names the classes that it makes
        model.__class__ = type("FSDPLactForCausalLM", (LactForCausalLM,), {})
    elif kind == "adapted":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :3] = -100
    logarithms = model(input_ids=ids).logits.log_softmax(-1)
    expected = [
        -0.9 * logarithms[row, place, labels[row, place + 1]] - 0.1 * logarithms[row, place].mean()
        for row in range(2)
        for place in range(8)
        if labels[row, place + 1] >= 0
    ]
    found = smoothing_loss(model.train(), {"input_ids": ids, "labels": labels}, tmp_path)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_label_smoothing_of_images_smooths_their_own_labels(tmp_path):
    config = VitttConfig(8, 1, 2, 4, num_labels=3, initializer_range=0.3)
    model, labels = VitttForImageClassification(config).eval(), torch.tensor([2, 0])
    image = torch.randn(2, 3, 8, 8)
    logits = model(image).logits
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(smoothing_loss(model, {"pixel_values": image, "labels": labels}, tmp_path), expected)


def test_a_trainer_counts_predicted_tokens_whatever_the_class_is_called():
    model = type("Mine", (LactForCausalLM,), {})(small_config(LADDER["rung2"]))
    assert model.loss_type == "ForCausalLM"
    assert "Mine" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_whose_passes_are_replayed_trains_as_it_did(tmp_path, accumulate):
    losses = []
    for replayed in (False, True):
        torch.manual_seed(0)
        model = small_model(LADDER["rung2"])
        rows = [tokens(1, 12, seed=i)[0].tolist() for i in range(8)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(replayed)),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            optim="adamw_torch_fused",
            report_to=[],
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
        (graph_trainer(trainer) if replayed else trainer).train()
        history = trainer.state.log_history
        losses.append([(x["step"], x[name]) for x in history for name in ("loss", "grad_norm", "eval_loss") if name in x])
    assert len(losses[0]) == 15
    assert losses[1] == losses[0]
