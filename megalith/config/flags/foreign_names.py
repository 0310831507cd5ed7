"""Names of other projects: scripts, verbs, flags and classes of Megatron-LM, DeepSpeed and Hugging Face.

Each has an answer: what it is called here, or "not there yet" and what to do meanwhile. The table shrinks as things are
built.
"""

from __future__ import annotations

import pathlib

_EVALUATION = (
    "it is `megalith evaluate` here, with the same flags: wikitext103, lambada, ppl, or --harness TASKS "
    "(docs/evaluation.md)"
)
_TASKS = (
    "WIKITEXT103 and LAMBADA are `megalith evaluate` here, and RACE, MNLI and QQP `megalith finetune TASK`, with the "
    "same flags; tools/retro/main.py is `megalith retro`; other tasks are not there yet"
)
_FINETUNING = "it is `megalith finetune TASK` here (docs/finetune_tasks.md)"
_RETRIEVAL = "it is `megalith pretrain ict` here (docs/retrieval.md)"
_RETRO_DATA = "it is `megalith retro` here, with the same flags: db, index, neighbors, or build (docs/retro.md)"
_RETRO = "it is `megalith pretrain retro` here (docs/retro.md)"
_CORPUS = "it is `megalith data` here: wiki, urls, clean, dedup, decontaminate, ids and more (docs/corpus.md)"
_JOBS = (
    "it is `megalith launch` here: `launch --nproc-per-node 8 pretrain gpt ...` on this machine, `launch --slurm` and "
    "`launch --pbs` write job scripts, --hostfile reaches machines by ssh"
)
_PLAN = "planning is not there yet; --dry-run with --world-size N checks a layout and prints its numbers"
_ACCELERATE = (
    "scripts import it from megalith.accelerate here, or megalith.accelerate.utils; the commands are `megalith config "
    "--accelerate` and `megalith launch` (docs/accelerate.md)"
)
_DETOXIFY = "it is `megalith detoxify` here, all steps of it (docs/detoxify.md)"
_REPORT = (
    "reports that compare runs are not there yet; each run folder has metrics.jsonl and loss.png, and "
    "--tensorboard-dir writes for TensorBoard"
)

# (answer, names as they are typed, in small letters: scripts without folder and ending, verbs, flags, classes)
_ANSWERS = (
    (
        "it is `megalith pretrain gpt` here",
        "pretrain_gpt pretrain_gpt2 pretrain_gpt_alcf pretrain_agpt_alcf pretrain_gpt_single_node train_gpt "
        "run_clm_no_trainer run_clm",
    ),
    ("it is `megalith pretrain gpt --recipe gpt3-175b` here", "pretrain_gpt3_175b"),
    ("it is `megalith pretrain bert` here", "pretrain_bert train_bert run_mlm"),
    ("it is `megalith pretrain t5` here", "pretrain_t5 train_t5"),
    ("it is `megalith pretrain MODEL` here", "train training pretrain_model run_pretraining"),
    ("it is `megalith data preprocess` here", "preprocess preprocess_data tokenize preprocess_data_many_cores"),
    ("it is `megalith data merge` here", "merge merge_datasets merge_preprocessed_data merge_dataset"),
    (
        "it is `megalith data split` here (and `megalith data merge`); `megalith launch --pbs data merge ...` as a job",
        "split merge_datasets_split merge_dataset_qsub",
    ),
    ("it is `megalith data inspect` here", "get_meta_data"),
    ("it is `megalith data weights` here", "gen_file_list weights"),
    ("it is `megalith data bpe` here", "bpe train_tokenizer"),
    (
        "it is `megalith checkpoint reshape` here",
        "reshape checkpoint_util merge_mp_partitions checkpoint_reshaping_and_interoperability",
    ),
    (
        "it is `megalith checkpoint import` here; pretrain --load and generate --load take such files as they are",
        "import convert_megatron_gpt2_checkpoint convert_megatron_bert_checkpoint convert_checkpoint "
        "hf2megads_weight_converter loader_llama_mistral loader_megatron loader_mcore convert_hf_checkpoint",
    ),
    (
        "it is `megalith checkpoint export` here",
        "export mds_to_hf saver_megatron saver_mcore deepspeed_to_transformers convert_lit_checkpoint",
    ),
    (
        "it is `megalith checkpoint import` here (from Hugging Face, Megatron or DeepSpeed), `export` (to them), "
        "or `data convert` (a dataset)",
        "convert",
    ),
    ("it is `megalith checkpoint inspect` here", "inspect inspect_checkpoint"),
    ("it is `megalith checkpoint edit` here", "edit adjust_checkpoint"),
    (
        "it is `megalith generate` here",
        "generate_samples_gpt generate_samples_gpt2 generate_text megatron_lm_gpt_generate megatron_gpt2_generation "
        "inference "
        "text_generation complete run_generation",
    ),
    (
        "it is `megalith serve PATH` here (and examples/run_text_generation_server_345M.sh)",
        "server run_text_generation_server text_generation_server run_text_generation_server_345m",
    ),
    ("it is `megalith ask HOST` here; with --megatron it asks and prints as that script", "text_generation_cli"),
    ("it is megalith.generate_tokens here (megalith.generate for texts)", "megatron_generate"),
    ("it is `megalith config` here", "init wizard new"),
    ("it is the recipe gpt2-345m here", "gpt2-medium-345m gpt2-medium 345m"),
    ("it is the recipe llama-3-8b here", "llama-8b llama3-8b"),
    ("it is the recipe llama-3.2-1b here", "llama-1b llama3.2-1b"),
    ("it is the recipe t5-base here", "t5-base-220m t5-220m"),
    (
        "it is megalith.load here",
        "automodel automodelforcausallm automodelforpretraining gpt2lmheadmodel from_pretrained load_model",
    ),
    ("it is megalith.models.gpt.GPT here", "gptmodel gpt2model"),
    ("it is megalith.models.bert.BERT here", "bertmodel"),
    ("it is megalith.models.t5.T5 here", "t5model"),
    ("it is megalith.data.indexed.IndexedDataset here", "indexeddataset mmapindexeddataset indexedcacheddataset"),
    ("it is megalith.data.indexed.IndexedWriter here", "indexeddatasetbuilder mmapindexeddatasetbuilder"),
    ("it is megalith.config.run.RunConfig here", "trainingarguments transformerconfig"),
    (
        "it is --max-new-tokens here (the new tokens alone are counted)",
        "--max-length --max-tokens --out-seq-length --tokens-to-generate --num-tokens-to-generate --max-gen-len",
    ),
    ("it is --num-samples here", "--num-return-sequences --num-results --n"),
    ("it is --prompt here", "--prompts --input-text"),
    ("it is --prompt-file here", "--sample-input-file --input-file"),
    ("it is --out-file here", "--sample-output-file --genfile"),
    ("it is --beam-width here", "--num-beams --beam-size"),
    ("texts are drawn unless --greedy is given", "--do-sample"),
    ("for generate it is --load here", "--model --model-name-or-path --checkpoint --ckpt --hf-model"),
    ("it is --stop here", "--stop-sequences --stop-strings"),
    ("it is --stop-token-ids here", "--stop-token --eos-token-id"),
    ("it is --seed here", "--random-seed"),
    ("it is --logprobs here", "--return-log-probs --output-logprobs"),
    ("it is --top-logprobs here", "--top-n-logprobs --top-n-tokens"),
    ("for generate it is --dtype float16 here", "--fp16 --half"),
    ("for generate it is --dtype bfloat16 here", "--bf16"),
    (
        "text is written by one process yet; a checkpoint of any layout is read",
        "--tensor-model-parallel-size --pipeline-model-parallel-size",
    ),
    ("it is --lr here", "--learning-rate"),
    ("it is --seq-length here", "--block-size"),
    ("it is --micro-batch-size here", "--per-device-train-batch-size --per-device-eval-batch-size"),
    (
        "--global-batch-size says it: what is more than --micro-batch-size times the data-parallel processes is "
        "accumulated",
        "--gradient-accumulation-steps --num-microbatches-in-minibatch --num-micro-batches",
    ),
    (
        "it is --train-iters or --train-samples here: a run is so many steps or samples long (--epochs for tasks)",
        "--num-train-epochs --max-train-steps --max-steps",
    ),
    ("it is --save here", "--output-dir"),
    ("it is --load here", "--resume-from-checkpoint"),
    ("it is --config here (a YAML file of megalith config)", "--config-file"),
    ("it is --recipe here (gpt2-small-124m, ...)", "--config-name"),
    (
        "a corpus is files here: megalith data preprocess makes tokens of JSON lines, parquet or text",
        "--dataset-name --dataset-config-name",
    ),
    ("it is --tensorboard-dir here", "--report-to --with-tracking"),
    (
        _EVALUATION,
        "eval lambada wikitext103 --overlapping-eval --strict-lambada ppl lm_eval lm-eval",
    ),
    (_FINETUNING, "sft chat race mnli qqp rte glue finetune_race finetune_mnli"),
    (_TASKS, "main"),
    (
        "it is `megalith pretrain --lora-rank 8` here (docs/lora.md)",
        "lora peft --lora-r --lora-dim --use-lora --use-peft",
    ),
    (
        _RETRIEVAL,
        "ict pretrain_ict ictbertmodel biencodermodel ictdataset realm",
    ),
    (
        "it is `megalith index` here: build embeds blocks, search finds the nearest (docs/retrieval.md)",
        "create_doc_index blockdata faissmipsindex indexbuilder",
    ),
    (
        "it is `megalith evaluate nq` here, with the same flags, of a bi-encoder that `megalith finetune nq` trains "
        "(docs/retrieval.md)",
        "nq orqa evaluate_orqa --qa-data-dev --qa-data-test --faiss-use-gpu --faiss-match --faiss-topk-retrievals",
    ),
    (_RETRO_DATA, "get_preprocess_cmd --retro-tasks"),
    (_RETRO, "pretrain_retro retromodel"),
    (
        _CORPUS,
        "clean dedup deduplicate cleanup_dataset find_duplicates group_duplicate_url remove_group_duplicates "
        "blacklist_urls filter_ngrams add_id openwebtext wikiextractor cleanup_fix_dataset",
    ),
    (
        _JOBS,
        "run train_llama_chia_qsub helpers slurm pbs qsub --nproc-per-node --nnodes --node-rank --hostfile "
        "train_agpt_7b train_agpt_7b_chia",
    ),
    (_PLAN, "plan simulate estimate memory"),
    (
        _ACCELERATE,
        "accelerate accelerator megatronlmplugin megatronlmdummyscheduler megatronlmdummydataloader megatronengine "
        "abstracttrainstep gpttrainstep berttrainstep t5trainstep gpttrainstepwithcustomloss "
        "megatron_lm_gpt_pretraining",
    ),
    (_DETOXIFY, "detxoify_lm perspective_api perspective_api_annotate filter-selfgeneration"),
    (_REPORT, "report compare plot tensorboard wandb"),
)


def megalith_name(name: str) -> str | None:
    """What `name` (a script with or without its path, a verb, a flag, a class) is here; None where it is not known."""
    key = name.lower()
    if key.startswith("-"):
        key = "--" + key.lstrip("-").replace("_", "-")
    elif key.endswith((".py", ".sh")):
        key = pathlib.PurePath(key).stem.removesuffix("_with_mp").removesuffix("_distributed")
    return _table().get(key)


def _table() -> dict[str, str]:
    return {name: text for text, names in _ANSWERS for name in names.split()}
