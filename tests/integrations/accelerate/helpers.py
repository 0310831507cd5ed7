"""A clean state of Accelerate around a test, in one process or in a rank of `run_ranks`; toy models of transformers."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState

VOCABULARY = 96  # tokens of the toy models
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HEADS = {  # short name of a head -> the end of the names of transformers' classes that have it
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "pretraining": "ForPreTraining",
    "classification": "ForSequenceClassification",
    "seq2seq": "ForConditionalGeneration",
}
KINDS = {  # model type of transformers -> how its classes begin, and its usual head
    "gpt2": ("GPT2", "causal"),
    "llama": ("Llama", "causal"),
    "bert": ("Bert", "pretraining"),
    "megatron-bert": ("MegatronBert", "pretraining"),
    "t5": ("T5", "seq2seq"),
    "mt5": ("MT5", "seq2seq"),
}


@contextlib.contextmanager
def accelerating(**variables: str) -> Iterator[None]:
    """What `accelerate launch` would set, and no state of Accelerate from before; both are undone afterwards.

    In a rank of `run_ranks` the process group that is there is used. Else this is one process without a launcher, and
    a process group that the block makes is destroyed.
    variables: further environment variables, such as MEGATRON_LM_TP_DEGREE="2".
    """
    before, has_group = dict(os.environ), dist.is_initialized()
    for name in list(os.environ):
        if name in LAUNCHER or name.startswith(("ACCELERATE_", "MEGATRON_LM_", "FSDP_", "PARALLELISM_CONFIG_")):
            del os.environ[name]
    if has_group:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(zip(LAUNCHER, (rank, size, rank, size, "127.0.0.1", str(_free_port()))))
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    reset()
    try:
        yield
    finally:
        reset()
        if dist.is_initialized() and not has_group:
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def reset() -> None:
    """Forget what Accelerate's singletons hold."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def toy_model(kind: str, head: str | None = None, *, seed: int = 0, **config: Any) -> transformers.PreTrainedModel:
    """A model of transformers with 4 layers, 32 hidden units, without dropout; equal on all ranks.

    kind: of KINDS. head: of HEADS; None is the usual one. config: further fields of the model's config.
    """
    begins, usual = KINDS[kind]
    ends = HEADS[head or usual]
    # GPT-2's class alone is not named as the others are.
    model_class = getattr(transformers, "GPT2LMHeadModel" if (kind, ends) == ("gpt2", "ForCausalLM") else begins + ends)
    fields = _fields(kind, dict(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(getattr(transformers, f"{begins}Config")(**fields))


def _fields(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    if kind == "gpt2":
        names = {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
            "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    elif kind in ("t5", "mt5"):
        names = {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 4,
            "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
            "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
    else:
        names = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip
        if kind != "llama":
            names |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return names | changes
