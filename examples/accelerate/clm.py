"""Trains a causal language model (GPT-2, Llama ...), from its config alone or on from weights, in any layout.

    megalith launch --config_file megatron_gpt_config.yaml examples/accelerate/clm.py \\
        --config_name gpt2-large --tokenizer_name gpt2-large \\
        --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 \\
        --block_size 1024 --learning_rate 5e-5 --num_train_epochs 5 \\
        --per_device_train_batch_size 24 --per_device_eval_batch_size 24 \\
        --with_tracking --report_to wandb --output_dir awesome_model

Models, tokenizers and data sets are local folders. Without a plugin of Megatron-LM it runs as with Accelerate.
"""

import argparse
import logging
import math
import os
import pathlib

import torch
from texts import blocks, read_texts
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    SchedulerType,
    default_data_collator,
    get_scheduler,
)

from megalith.accelerate import Accelerator, DistributedType
from megalith.accelerate.logging import get_logger
from megalith.accelerate.utils import MegatronLMDummyScheduler, is_wandb_available, set_seed

logger = get_logger(__name__)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder with a model, whose weights are trained on")
    parser.add_argument("--config_name", help="folder with a config.json, to train from scratch")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--dataset_name", required=True, help="folder with text files (see texts.py)")
    parser.add_argument("--dataset_config_name", help="a folder within it")
    parser.add_argument("--block_size", type=int, help="tokens of a sample (the model's, at most 1024)")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int, help="optimizer steps, instead of epochs")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="calls of the model in a step")
    parser.add_argument("--lr_scheduler_type", type=SchedulerType, default="linear", choices=list(SchedulerType))
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--output_dir", help="where the trained model and checkpoints go")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--checkpointing_steps", help="save the state every so many steps, or `epoch`")
    parser.add_argument("--resume_from_checkpoint", help="folder of a saved state: step_10, epoch_0 ...")
    parser.add_argument("--with_tracking", action="store_true", help="record losses")
    parser.add_argument("--report_to", default="all", help="tensorboard, wandb, comet_ml, clearml or all")
    args = parser.parse_args()
    if not (args.model_name_or_path or args.config_name):
        parser.error("give --model_name_or_path, or --config_name to train from scratch")
    if args.with_tracking and not args.output_dir:
        parser.error("give --output_dir, where trackers write")
    return args


def main() -> None:
    """Prepare, train, evaluate after each epoch, save."""
    args = parse_args()
    has_tracker = args.report_to != "wandb" or is_wandb_available()
    tracking = {"log_with": args.report_to if has_tracker else "all", "project_dir": args.output_dir}
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, **(tracking if args.with_tracking else {})
    )
    if args.with_tracking and not has_tracker:
        accelerator.print("wandb is not installed; losses are recorded by all trackers that are")
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    if args.seed is not None:
        set_seed(args.seed)
    if accelerator.is_main_process and args.output_dir:
        os.makedirs(args.output_dir, exist_ok=True)
    accelerator.wait_for_everyone()

    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config_name))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path or args.config_name)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    block_size = args.block_size or min(1024, tokenizer.model_max_length)
    with accelerator.main_process_first():
        texts = read_texts(args.dataset_name, args.dataset_config_name)
        data = {
            split: [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in cut]
            for split, cut in ((split, blocks(tokenizer, texts[split], block_size)) for split in texts)
        }
    train_dataloader = DataLoader(
        data["train"], shuffle=True, collate_fn=default_data_collator, batch_size=args.per_device_train_batch_size
    )
    eval_dataloader = DataLoader(
        data["validation"], collate_fn=default_data_collator, batch_size=args.per_device_eval_batch_size
    )

    no_decay = ("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight", "layernorm.weight", "norm.weight")
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith(no_decay)], "weight_decay": args.weight_decay},
        {"params": [p for n, p in named if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)

    data_parallel, micro_batches = accelerator.num_processes, 1
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        plugin = accelerator.state.megatron_lm_plugin
        data_parallel //= plugin.tp_degree * plugin.pp_degree * plugin.context_parallel_size
        micro_batches = plugin.num_micro_batches
    samples_per_call = args.per_device_train_batch_size * micro_batches * data_parallel
    calls_per_epoch = math.ceil(len(data["train"]) / samples_per_call)
    steps_per_epoch = math.ceil(calls_per_epoch / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        lr_scheduler = MegatronLMDummyScheduler(
            optimizer=optimizer, total_num_steps=args.max_train_steps, warmup_num_steps=args.num_warmup_steps
        )
    else:
        lr_scheduler = get_scheduler(  # Accelerate moves it once for each process
            name=args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
            num_training_steps=args.max_train_steps * accelerator.num_processes,
        )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    if args.with_tracking:
        accelerator.init_trackers("clm", {name: str(value) for name, value in vars(args).items()})
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        total_batch_size = accelerator.state.megatron_lm_plugin.global_batch_size * args.gradient_accumulation_steps
    else:
        total_batch_size = (
            args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        )
    logger.info("***** Running training *****")
    logger.info(f"  Num examples = {len(data['train'])}")
    logger.info(f"  Num Epochs = {args.num_train_epochs}")
    logger.info(f"  Instantaneous batch size per device = {args.per_device_train_batch_size}")
    logger.info(f"  Total train batch size (w. parallel, distributed & accumulation) = {total_batch_size}")
    logger.info(f"  Gradient Accumulation steps = {args.gradient_accumulation_steps}")
    logger.info(f"  Total optimization steps = {args.max_train_steps}")

    completed_steps = first_epoch = skipped = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        what, _, number = pathlib.Path(args.resume_from_checkpoint).name.partition("_")
        completed_steps = (int(number) + 1) * steps_per_epoch if what == "epoch" else int(number)
        first_epoch = completed_steps // steps_per_epoch
        skipped = completed_steps % steps_per_epoch * args.gradient_accumulation_steps
    progress = tqdm(total=args.max_train_steps, initial=completed_steps, disable=not accelerator.is_local_main_process)

    def save_state(name: str) -> None:
        accelerator.save_state(os.path.join(args.output_dir or ".", name))

    for epoch in range(first_epoch, args.num_train_epochs):
        model.train()
        total_loss = 0.0
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        active = train_dataloader
        if skipped:
            active, skipped = accelerator.skip_first_batches(train_dataloader, skipped), 0
        for batch in active:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress.update(1)
                completed_steps += 1
                every = args.checkpointing_steps or ""
                if every.isdigit() and completed_steps % int(every) == 0:
                    save_state(f"step_{completed_steps}")
            if completed_steps >= args.max_train_steps:
                break

        model.eval()
        losses = []
        for batch in eval_dataloader:
            with torch.no_grad():
                loss = model(**batch).loss
            losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
        eval_loss = torch.cat(losses).mean()
        perplexity = math.exp(eval_loss) if eval_loss < 100 else float("inf")
        logger.info(f"epoch {epoch}: perplexity: {perplexity} eval_loss: {eval_loss}")
        if args.with_tracking:
            values = {"perplexity": perplexity, "eval_loss": eval_loss, "epoch": epoch, "step": completed_steps}
            accelerator.log(values | {"train_loss": total_loss.item() / len(train_dataloader)}, step=completed_steps)
        if args.checkpointing_steps == "epoch":
            save_state(f"epoch_{epoch}")

    if args.output_dir:
        accelerator.wait_for_everyone()
        unwrapped_model = accelerator.unwrap_model(model)
        unwrapped_model.save_pretrained(  # every process calls it, with and without a plugin
            args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
