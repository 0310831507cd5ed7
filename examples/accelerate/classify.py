"""Finetunes MegatronBERT, or another BERT, on a task of GLUE: RTE, QQP or MNLI.

    megalith launch --config_file tp2.yaml examples/accelerate/classify.py \\
        --model_name_or_path megatron-bert --task_name RTE --data_dir glue/RTE --output_dir rte

data_dir has the task's train.tsv and dev.tsv (MNLI: dev_matched.tsv), as GLUE gives them. Without a plugin of
Megatron-LM it runs as with Accelerate.
"""

import argparse
import csv
import pathlib

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import set_seed

TASKS = {  # columns of the two sentences and of the label, labels in order of their numbers, file of validation
    "RTE": ("sentence1", "sentence2", "label", ["entailment", "not_entailment"], "dev.tsv"),
    "QQP": ("question1", "question2", "is_duplicate", ["0", "1"], "dev.tsv"),
    "MNLI": ("sentence1", "sentence2", "gold_label", ["entailment", "neutral", "contradiction"], "dev_matched.tsv"),
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder with a model, whose weights are trained on")
    parser.add_argument("--config_name", help="folder with a config.json, to train from scratch")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--task_name", required=True, choices=list(TASKS))
    parser.add_argument("--data_dir", required=True, help="folder with the task's .tsv files")
    parser.add_argument("--max_length", type=int, default=128, help="most tokens of a pair")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--output_dir", help="where the trained model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model_name_or_path or args.config_name):
        parser.error("give --model_name_or_path, or --config_name to train from scratch")
    return args


def read_pairs(path: pathlib.Path, task: str, tokenizer, max_length: int) -> list[dict]:
    """The tokens and the label of each pair of sentences that has a label."""
    first, second, column, labels, _ = TASKS[task]
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row[column] in labels]
    encoded = (tokenizer(row[first], row[second], truncation=True, max_length=max_length) for row in rows)
    return [{**pair, "labels": labels.index(row[column])} for row, pair in zip(rows, encoded)]


def main() -> None:
    """Prepare, train, measure the accuracy after each epoch, save."""
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)
    number = {"num_labels": len(TASKS[args.task_name][3])}
    if args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **number)
    else:
        config = AutoConfig.from_pretrained(args.config_name, **number)
        model = AutoModelForSequenceClassification.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path or args.config_name)
    folder, collate = pathlib.Path(args.data_dir), DataCollatorWithPadding(tokenizer)
    train, dev = (
        read_pairs(folder / name, args.task_name, tokenizer, args.max_length)
        for name in ("train.tsv", TASKS[args.task_name][4])
    )
    batch_size = args.per_device_train_batch_size
    train_loader = DataLoader(train, shuffle=True, batch_size=batch_size, collate_fn=collate)
    eval_loader = DataLoader(dev, batch_size=batch_size, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)

    for epoch in range(args.num_train_epochs):
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        right = total = 0
        for batch in eval_loader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
            right, total = right + (predictions == labels).sum().item(), total + len(labels)
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, accuracy {right / total:.4f} of {total}")

    if args.output_dir:
        accelerator.unwrap_model(model).save_pretrained(
            args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
