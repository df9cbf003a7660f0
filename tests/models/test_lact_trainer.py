"""transformers' own Trainer on the LaCT language model."""

import pytest
import torch
from lact_small import LADDER, small_model, tokens

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
