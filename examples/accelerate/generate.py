"""Writes texts with a model in any layout: greedy, top-k, top-p, beams.

    megalith launch --config_file tp2_pp2.yaml examples/accelerate/generate.py \\
        --model_name_or_path awesome_model --prompt "Are you human?" --prompt "The purpose of life is" --top_p 0.9

The model is a local folder. Without a config file it is on one process.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import MegatronLMPlugin


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder with a model and its tokenizer")
    parser.add_argument("--tokenizer_name", help="folder with a tokenizer, where the model's has none")
    parser.add_argument("--prompt", action="append", required=True, help="a text to go on with; may be repeated")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--top_p_decay", type=float, default=0.0, help="factor of top_p at each token")
    parser.add_argument("--num_beams", type=int, help="beam search of this width")
    parser.add_argument("--length_penalty", type=float)
    parser.add_argument("--add_BOS", action="store_true", help="put the first token of a text before each prompt")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prepare the model, generate, print on one process."""
    args = parse_args()
    accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin())  # whose fields are those of the config file
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(args.model_name_or_path))
    model.eval()
    batch = tokenizer(args.prompt, return_tensors="pt", padding=True)
    chosen = {
        name: value
        for name in ("temperature", "top_k", "top_p", "num_beams", "length_penalty")
        if (value := getattr(args, name)) is not None
    }
    tokens = model.megatron_generate(
        batch["input_ids"], batch["attention_mask"], max_new_tokens=args.max_new_tokens, add_BOS=args.add_BOS,
        top_p_decay=args.top_p_decay, random_seed=args.seed, **chosen,
    )  # fmt: skip
    for text in tokenizer.batch_decode(tokens.cpu().numpy(), skip_special_tokens=True):
        accelerator.print(text)


if __name__ == "__main__":
    main()
