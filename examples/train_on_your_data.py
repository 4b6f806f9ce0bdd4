"""Fine-tune a model with LoRA on rows of your own, with the stock Trainer, and ask it a question.

python examples/train_on_your_data.py MODEL DATA OUTPUT

DATA is a folder with `train.jsonl`; one row a line, media paths relative to the folder:
{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
              {"role": "assistant", "content": "a cat"}],
 "images": ["pictures/cat.png"], "audio": []}
"""

import sys

from peft import get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments

import chorus_moe  # noqa: F401  registers the model with the Auto classes
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import load_rows
from chorus_moe.training.evaluate import evaluate_rows
from chorus_moe.training.lora import lora_config


def main(source: str, data: str, output: str) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    model = get_peft_model(model, lora_config(model, banks=["image", "common"], cross_modal=True))
    rows = load_rows(data, "train")
    arguments = TrainingArguments(
        output,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to="none",
        # The collator reads the raw columns, and the labels have their name under any wrapper.
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model, arguments, data_collator=ChorusDataCollator(processor), train_dataset=rows, processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    print(evaluate_rows(model.eval(), processor, rows).to_dict())


if __name__ == "__main__":
    main(*sys.argv[1:])
