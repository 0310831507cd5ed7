"""Trains a masked language model, MegatronBERT above all, from its config or on from weights, in any layout.

    megalith launch --config_file pp2.yaml examples/accelerate/mlm.py \\
        --config_name megatron-bert --dataset_name wikitext --max_seq_length 512 --output_dir bert

Models, tokenizers and data sets are local folders. Without a plugin of Megatron-LM it runs as with Accelerate.
"""

import argparse
import math

import torch
from texts import blocks, read_texts
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, get_scheduler

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import set_seed


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder with a model, whose weights are trained on")
    parser.add_argument("--config_name", help="folder with a config.json, to train from scratch")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--dataset_name", required=True, help="folder with text files (see texts.py)")
    parser.add_argument("--max_seq_length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--mlm_probability", type=float, default=0.15, help="share of tokens that are masked")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="calls of the model in a step")
    parser.add_argument("--output_dir", help="where the trained model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model_name_or_path or args.config_name):
        parser.error("give --model_name_or_path, or --config_name to train from scratch")
    return args


def main() -> None:
    """Prepare, train, evaluate, save."""
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)
    if args.model_name_or_path:
        model = AutoModelForMaskedLM.from_pretrained(args.model_name_or_path)
    else:
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(args.config_name))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path or args.config_name)
    texts = read_texts(args.dataset_name)
    samples = {
        split: [{"input_ids": ids} for ids in blocks(tokenizer, texts[split], args.max_seq_length, special=True)]
        for split in texts
    }
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    loading = {"batch_size": args.per_device_train_batch_size, "collate_fn": collate}
    train_loader = DataLoader(samples["train"], shuffle=True, **loading)
    eval_loader = DataLoader(samples["validation"], **loading)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler("linear", optimizer, args.num_warmup_steps, args.max_train_steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    steps = 0
    while steps < args.max_train_steps:
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
            if steps == args.max_train_steps:
                break
        accelerator.print(f"step {steps}: training loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        losses = torch.stack([accelerator.reduce(model(**batch).loss, "mean") for batch in eval_loader])
    eval_loss = losses.mean().item()
    accelerator.print(f"validation loss {eval_loss:.4f}, perplexity {math.exp(min(eval_loss, 100)):.2f}")
    if args.output_dir:
        accelerator.unwrap_model(model).save_pretrained(
            args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
