"""Trains a T5 or mT5 to write the second half of a text from its first, in any layout (a pipeline too).

    megalith launch --config_file pp2.yaml examples/accelerate/t5.py \\
        --model_name_or_path t5-small --dataset_name wikitext --block_size 256 --output_dir t5

(A prefix language model: Raffel et al., 2020, section 3.2.3.) Models, tokenizers and data sets are local folders.
Without a plugin of Megatron-LM it runs as with Accelerate.
"""

import argparse

import torch
from texts import blocks, read_texts
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, get_scheduler

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import set_seed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder with a model, whose weights are trained on")
    parser.add_argument("--config_name", help="folder with a config.json, to train from scratch")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--dataset_name", required=True, help="folder with text files (see texts.py)")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a text, both halves")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--output_dir", help="where the trained model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model_name_or_path or args.config_name):
        parser.error("give --model_name_or_path, or --config_name to train from scratch")
    return args


def main() -> None:
    """Prepare, train, evaluate, save."""
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)
    if args.model_name_or_path:
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path)
    else:
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(args.config_name))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path or args.config_name)
    texts, half = read_texts(args.dataset_name), args.block_size // 2
    samples = {
        split: [{"input_ids": ids[:half], "labels": ids[half:]} for ids in blocks(tokenizer, texts[split], 2 * half)]
        for split in texts
    }
    loading = {"batch_size": args.per_device_train_batch_size, "collate_fn": DataCollatorForSeq2Seq(tokenizer)}
    train_loader = DataLoader(samples["train"], shuffle=True, **loading)
    eval_loader = DataLoader(samples["validation"], **loading)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = get_scheduler("linear", optimizer, args.num_warmup_steps, args.max_train_steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    steps = 0
    while steps < args.max_train_steps:
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps += 1
            if steps == args.max_train_steps:
                break
        accelerator.print(f"step {steps}: training loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        losses = torch.stack([accelerator.reduce(model(**batch).loss, "mean") for batch in eval_loader])
    accelerator.print(f"validation loss {losses.mean().item():.4f}")
    if args.output_dir:
        accelerator.unwrap_model(model).save_pretrained(
            args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
