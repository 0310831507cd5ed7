"""Trains a GPT-2 on a Megatron indexed data set, with a train step of its own, in any layout.

    megalith data preprocess --input corpus.jsonl --output-prefix corpus --append-eod \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model gpt2
    megalith launch --config_file tp2_pp2.yaml examples/accelerate/indexed.py \\
        --config_name gpt2 --data_path corpus_text_document --splits_string 90,5,5 \\
        --block_size 1024 --max_train_steps 1000 --keyword plt --keyword sk --output_dir codeparrot

The step gives samples with the keywords more weight, as the guide of Accelerate's Megatron-LM integration shows it.
Models and tokenizers are local folders. Without a config file it trains on one process.
"""

import argparse
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import (
    GPTTrainStep,
    MegatronLMDummyDataLoader,
    MegatronLMDummyScheduler,
    MegatronLMPlugin,
    avg_losses_across_data_parallel_group,
    set_seed,
)


class KeywordTrainStep(GPTTrainStep):
    """Losses are averaged in each sample; samples with key tokens weigh more: 1 + alpha x their number."""

    def __init__(self, megatron_args, keytoken_ids, alpha):
        super().__init__(megatron_args)
        self.keytoken_ids, self.alpha = torch.tensor(keytoken_ids), alpha

    def get_loss_func(self):
        """loss_func(tokens, loss_mask, losses), each [b, s]."""

        def loss_func(tokens, loss_mask, losses):
            of_samples = (losses * loss_mask).sum(dim=1) / loss_mask.sum(dim=1).clamp(min=1.0)
            keytokens = torch.isin(tokens, self.keytoken_ids.to(tokens.device)).sum(dim=1)
            loss = (of_samples * (1.0 + self.alpha * keytokens)).mean()
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}

        return loss_func

    def get_forward_step_func(self):
        """As GPTTrainStep's, but the loss function gets the tokens too."""

        def forward_step(data_iterator, model):
            tokens, labels, loss_mask, attention_mask, position_ids = self.get_batch(data_iterator)
            losses = model(tokens, position_ids, attention_mask, labels=labels)
            return losses, partial(self.loss_func, tokens, loss_mask)

        return forward_step


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="folder with a model, whose weights are trained on")
    parser.add_argument("--config_name", help="folder with a config.json, to train from scratch")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--data_path", required=True, nargs="+", help="prefix of the indexed data set")
    parser.add_argument("--splits_string", default="969,30,1", help="shares of training, validation and test")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--eval_interval", type=int, default=100, help="steps from one validation to the next")
    parser.add_argument("--eval_iters", type=int, default=10, help="calls of the model in a validation")
    parser.add_argument("--keyword", action="append", default=[], help="a word of one token; may be repeated")
    parser.add_argument("--alpha", type=float, default=0.25, help="what a key token adds to the weight of its sample")
    parser.add_argument("--output_dir", help="where the trained model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model_name_or_path or args.config_name):
        parser.error("give --model_name_or_path, or --config_name to train from scratch")
    return args


def main() -> None:
    """Prepare, train with validations in between, save."""
    args = parse_args()
    accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin())  # whose fields are those of the config file
    set_seed(args.seed)
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config_name))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path or args.config_name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = MegatronLMDummyScheduler(optimizer, args.max_train_steps, args.num_warmup_steps)

    words = [form for word in args.keyword for form in (word, " " + word)]
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    keytoken_ids = [ids[0] for ids in encoded if len(ids) == 1]
    accelerator.print(f"Keytoken ids: {keytoken_ids}")
    plugin = accelerator.state.megatron_lm_plugin
    plugin.custom_train_step_class = KeywordTrainStep
    plugin.custom_train_step_kwargs = {"keytoken_ids": keytoken_ids, "alpha": args.alpha}
    plugin.megatron_dataset_flag = True
    plugin.eval_interval, plugin.eval_iters, plugin.train_iters = (
        args.eval_interval, args.eval_iters, args.max_train_steps,
    )  # fmt: skip
    loader = MegatronLMDummyDataLoader(
        data_path=args.data_path,
        splits_string=args.splits_string,
        seq_length=args.block_size,
        micro_batch_size=args.per_device_train_batch_size,
    )
    model, optimizer, scheduler, train_loader, eval_loader, _ = accelerator.prepare(
        model, optimizer, scheduler, loader, loader, loader
    )

    for step in range(1, args.max_train_steps + 1):
        model.train()
        loss = model(**next(train_loader)).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % args.eval_interval == 0 or step == args.max_train_steps:
            model.eval()
            with torch.no_grad():
                losses = [model(**next(eval_loader)).loss for _ in range(args.eval_iters)]
            validation = torch.stack(losses).mean().item()
            accelerator.print(f"step {step}: training loss {loss.item():.4f}, validation loss {validation:.4f}")

    if args.output_dir:
        accelerator.unwrap_model(model).save_pretrained(
            args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
        if accelerator.is_main_process:
            tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
