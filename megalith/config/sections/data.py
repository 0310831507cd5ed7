"""The section `data`: which tokens are read, and how they become samples."""

from __future__ import annotations

import math
import re

from megalith.common.errors import ConfigError, problem
from megalith.config.options import option, section

TOKENIZERS = (
    "GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase", "HuggingFaceTokenizer", "HFTokenizer",
    "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer", "NullTokenizer",
)  # fmt: skip

CORPUS_DATASETS = ("gpt", "bert", "t5", "ict", "retro")  # made from corpora, not from the files of a task
INSTRUCTIONS = ("chat", "completion")  # datasets of supervised finetuning
OF_FILES = (*INSTRUCTIONS, "nq")  # datasets of --train-data and --valid-data that no YAML file describes
TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")  # fields that name what a tokenizer is made from
MADE_FROM = {  # tokenizer -> fields of files; HuggingFaceTokenizer takes --vocab-file too
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    **dict.fromkeys(("BertWordPieceLowerCase", "BertWordPieceCase"), ("vocab_file",)),
    **dict.fromkeys(
        ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"), ("tokenizer_model",)
    ),
}


@section
class DataConfig:
    """Corpora, tokenizer and how samples are made."""

    data_path: list[str] = option([], "indexed dataset prefix, or weight prefix weight prefix ...")
    train_data_path: list[str] = option([], "as --data-path, for training alone")
    valid_data_path: list[str] = option([], "as --data-path, for validation alone")
    test_data_path: list[str] = option([], "as --data-path, for testing alone")
    data_file_list: str | None = option(
        None, "file with a line `weight path corpus` for each indexed dataset, instead of --data-path"
    )
    blend_sample_in_corpus: bool = option(
        False, "with --data-file-list: blend the files of a corpus instead of reading one after the other"
    )
    shuffle_sample_in_corpus: bool = option(False, "with --data-file-list: shuffle the samples of each corpus")
    data_weights_schedule: str | None = option(
        None,
        "file with a line `sample weight weight ...` for each change of the blend during the run, "
        "in the order of --data-path",
    )
    split: str = option("969, 30, 1", "fractions of training, validation and test documents")
    split_rounding: str = option(
        "core",
        "how fractions become document counts: as Megatron core, or as Megatron of 2022",
        choices=("core", "legacy"),
    )
    seq_length: int | None = option(None, "tokens of a sample", minimum=1)
    dataset: str = option(
        "gpt",
        "dataset by registry name, or module:name of your own",
        names=(*CORPUS_DATASETS, "classification", *OF_FILES),
    )
    loss: str = option(
        "lm",
        "loss by registry name, or module:name of your own",
        names=("lm", "bert", "t5", "classification", "regression", "ict", "nq"),
    )
    tokenizer_type: str | None = option(
        None,
        "GPT2BPETokenizer, HuggingFaceTokenizer (a tokenizer.json), NullTokenizer, ... or module:name",
        names=TOKENIZERS,
    )
    vocab_file: str | None = option(None, "vocabulary file of the tokenizer")
    merge_file: str | None = option(None, "merge table of the tokenizer")
    tokenizer_model: str | None = option(
        None, "tokenizer.json, its folder, or a sentencepiece model", flags=("--tokenizer-name-or-path",)
    )
    tiktoken_pattern: str = option("v2", "how TikTokenizer cuts text before ranks apply", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = option(1000, "ids that TikTokenizer keeps for special tokens", minimum=3)
    tiktoken_special_tokens: list = option(
        [], "names of the first special tokens of TikTokenizer (default: <unk> <s> </s>)"
    )
    vocab_extra_ids: int = option(0, "sentinel tokens <extra_id_i> added to the vocabulary", minimum=0)
    data_cache_path: str | None = option(
        None, "folder of the index cache (default: beside the data, or in the run folder where that is read-only)"
    )
    mmap_bin_files: bool = option(True, "map token files into memory; without, each sample is one read")
    reset_position_ids: bool = option(False, "start positions anew after each end-of-document token")
    reset_attention_mask: bool = option(False, "tokens attend only to their own document")
    eod_mask_loss: bool = option(False, "no loss on what follows an end-of-document token")
    mask_prob: float = option(0.15, "bert, t5: fraction of tokens that are masked", minimum=0.0)
    short_seq_prob: float = option(0.1, "bert, t5: fraction of samples that are shorter than --seq-length", minimum=0.0)
    decoder_seq_length: int | None = option(None, "t5: tokens of the decoder (default: --seq-length)", minimum=1)
    titles_data_path: str | None = option(None, "ict: indexed dataset with the title of each document")
    use_one_sent_docs: bool = option(False, "ict: allow blocks of a single sentence")
    query_in_block_prob: float = option(0.1, "ict: how often the query stays in its block", minimum=0.0)
    block_samples_mapping: str | None = option(
        None, "ict: module:name of your own function that says which sentences make a block, instead of Megatron's"
    )
    retro_workdir: str | None = option(
        None, "retro: folder of the database and of the samples' neighbours, as `megalith retro` makes it"
    )
    retro_no_retrieval: bool = option(
        False, "retro: read no neighbours, as if none had been found; the model then is a GPT"
    )
    chat_template: str | None = option(
        None, "chat: file with a chat template in Jinja, instead of the tokenizer's; kept in checkpoints"
    )
    packing: bool = option(
        True, "chat, completion: several samples in a row of --seq-length, none of which sees another"
    )
    excess_length_strategy: str = option(
        "drop",
        "chat, completion: leave samples out that are longer than --seq-length, cut them, or stop",
        choices=("drop", "truncate", "raise"),
    )
    assistant_only_loss: bool = option(
        True, "chat, completion: train what the assistant writes alone; --no-...: prompts too"
    )
    max_unusable: str = option(
        "10%", "chat, completion: lines of a file that may be left out, as malformed: a count (25), or a fraction"
    )
    dataloader_type: str = option(
        "single", "sample order: as the dataset has it, or reshuffled each epoch", choices=("single", "cyclic")
    )
    num_workers: int = option(2, "threads that read samples ahead", minimum=0)


def missing_tokenizer_files(data: DataConfig) -> list[str]:
    """Fields of the files that the tokenizer is made from, as far as they are not given."""
    return [name for name in MADE_FROM.get(data.tokenizer_type or "", ()) if getattr(data, name) is None]


def too_many_tokens(tokens: int, rows: int) -> str:
    """The message on a tokenizer with more tokens than its model's embedding has rows, and the cure."""
    return (
        f"the tokenizer has {tokens} tokens and the embedding {rows} rows: name the tokenizer that the weights were "
        f"trained with, by --tokenizer FOLDER, --vocab-file FILE --merge-file FILE, or --tokenizer-model FILE"
    )


def split_fractions(split: str) -> list[float]:
    """The three fractions of a split such as "969, 30, 1", of sum 1; what is not given is 0. Raises ConfigError."""
    try:
        numbers = [float(part) for part in re.split(r"[,/\s]+", split.strip(" ,/"))]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < sum(numbers) < math.inf:
        rule = "must be up to three numbers (training, validation, test), none negative, not all zero"
        raise ConfigError(problem("--split", split, rule, "Write for example --split 969,30,1"))
    numbers += [0.0] * (3 - len(numbers))
    return [number / sum(numbers) for number in numbers]
