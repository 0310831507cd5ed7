"""Chats to finetune on: templates in the form of public models', a tokenizer that has their tokens, and toy data."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalith.config.run import RunConfig

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}\
{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'] | trim + ' [/INST]' }}\
{% else %}{% generation %}{{ ' ' + message['content'] | trim }}{% endgeneration %}{{ ' ' + eos_token }}{% endif %}\
{% endfor %}"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}\
{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' }}{% if role == 'model' %}\
{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}\
{% else %}{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
ZEPHYR = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}\
{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
TEMPLATES = {  # name -> (template with marks, what ends a turn, whether it takes a system's turn)
    "chatml": (CHATML, "<|im_end|>", True), "llama2": (LLAMA2, "</s>", True), "llama3": (LLAMA3, "<|eot_id|>", True),
    "gemma": (GEMMA, "<end_of_turn>", False), "zephyr": (ZEPHYR, "</s>", True), "mistral": (MISTRAL, "</s>", False),
}  # fmt: skip
SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TEXT = "Hello there, what is two and two? The answer is four. Why? Because one and one and one and one are four. "


def unmarked(template: str) -> str:
    """The template without {% generation %}, as most of the public ones are."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_tokenizer(folder: pathlib.Path, template: str | None = None, **settings: str) -> pathlib.Path:
    """A byte-level tokenizer of 300 tokens and the special tokens, as a Hugging Face folder has it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


USER = {"role": "user", "content": "What is two and two?"}
LENGTHS = (1, 4, 2, 9, 1, 3, 12, 5)


def write_chats(path: pathlib.Path, lengths: Sequence[int] = LENGTHS, **more: Any) -> str:
    """A file of chats whose answers have so many words. more: further keys of each line."""
    lines = [{"messages": [USER, {"role": "assistant", "content": " ".join(["four"] * n)}], **more} for n in lengths]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def make_config(folder: pathlib.Path, template: str | None = None, **changes: Any) -> RunConfig:
    """A tiny GPT finetuned on chats. template: of its tokenizer, "" for none (default: ChatML without marks)."""
    write_tokenizer(folder / "tokenizer", unmarked(CHATML) if template is None else template or None)
    values = {
        "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / "tokenizer"), "dataset": "chat",
        "seq_length": 64, "max_position_embeddings": 64, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
        "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 4, "lr": 1e-2, "device": "cpu",
        "progress": "none",
    }  # fmt: skip
    return RunConfig().replace(**(values | changes))
