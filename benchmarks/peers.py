"""The candidates of benchmarks/train.py.

Each builder returns a function that does one training step and returns its loss.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

Step = Callable[[], float | None]


def ours(args: argparse.Namespace, device: torch.device, ids: Tensor, labels: Tensor, *, compile: bool = False) -> Step:
    """This project's model, loss and optimizer, through the same functions as `megalith pretrain`."""
    from megalith.optim.build import build_optimizer
    from megalith.optim.clip import clip, gradients
    from megalith.parallel.mesh import init_mesh
    from megalith.runtime.build import build_runtime

    config = our_config(args).replace(compile=compile, device=args.device, bf16=args.dtype == "bfloat16")
    runtime = build_runtime(config, init_mesh(config.parallel))
    optimizer = build_optimizer(config.optimizer, runtime.model.named_parameters())
    weights = torch.full(labels.shape, 1.0 / labels.numel(), device=device)
    # What masks are drawn from
    samples, number = (
        torch.arange(len(ids), device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )

    def step() -> float:
        loss = runtime.model(ids, labels=labels, loss_weights=weights, samples=samples, step=number.add_(1)).sum()
        loss.backward()
        clip(gradients(runtime.model.named_parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_config(args: argparse.Namespace):
    """GPT-2's form."""
    from megalith.config.run import RunConfig

    return RunConfig().replace(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        max_position_embeddings=args.sequence,
        seq_length=args.sequence,
        vocab_size=args.vocab_size,
        openai_gelu=True,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        lr=1e-3,
        weight_decay=0.0,
        adam_beta2=0.999,
    )


def our_weights(args: argparse.Namespace) -> dict[str, Tensor]:
    """The weights that all candidates start from."""
    from megalith.runtime.build import build_model

    config = our_config(args)
    return {
        name: value.detach()
        for name, value in build_model(config.model, torch.device("cpu"), seed=config.batch.seed).named_parameters()
    }


def train(args: argparse.Namespace, model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """A plain step with torch's fused AdamW and clipping; bf16 by autocast, as these libraries are used."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def hugging_face(
    args: argparse.Namespace, device: torch.device, ids: Tensor, labels: Tensor, *, compile: bool = False
) -> Step:
    """transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.sequence,
        n_embd=args.hidden_size,
        n_layer=args.num_layers,
        n_head=args.heads,
        resid_pdrop=args.hidden_dropout,
        embd_pdrop=args.hidden_dropout,
        attn_pdrop=args.attention_dropout,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    w = our_weights(args)
    with torch.no_grad():
        t = model.transformer
        t.wte.weight.copy_(w["embedding.weight"])
        t.wpe.weight.copy_(w["position_embedding.weight"])
        for i, block in enumerate(t.h):
            p = f"layers.{i}."
            block.attn.c_attn.weight.copy_(torch.cat([w[f"{p}attention.{x}.weight"] for x in "qkv"]).t())
            block.attn.c_proj.weight.copy_(w[f"{p}attention.out.weight"].t())
            block.mlp.c_fc.weight.copy_(w[f"{p}mlp.up.weight"].t())
            block.mlp.c_proj.weight.copy_(w[f"{p}mlp.down.weight"].t())
    del w
    model = model.to(device).train()
    forward = torch.compile(model) if compile else model
    flat = labels.flatten()

    def loss_of() -> Tensor:
        return nn.functional.cross_entropy(forward(input_ids=ids).logits.flatten(0, 1).float(), flat)

    return train(args, model, loss_of)


def megatron_core(args: argparse.Namespace, device: torch.device, ids: Tensor, labels: Tensor) -> Step:
    """megatron-core's GPTModel with its local (no TransformerEngine) layers."""
    if device.type == "cpu":
        mock.patch("torch.cuda.current_device", lambda: device).start()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(1)
    else:  # its dropout, off here, asks for a CUDA generator
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext()).start()
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_func=lambda x: nn.functional.gelu(x, approximate="tanh"),
        bf16=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), args.vocab_size, args.sequence, position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    w, heads, width = our_weights(args), args.heads, args.hidden_size // args.heads
    with torch.no_grad():
        model.embedding.word_embeddings.weight.copy_(w["embedding.weight"])
        model.embedding.position_embeddings.weight.copy_(w["position_embedding.weight"])
        for i, layer in enumerate(model.decoder.layers):
            p = f"layers.{i}."
            # Per head: q, k, v
            qkv = torch.stack([w[f"{p}attention.{x}.weight"].view(heads, width, -1) for x in "qkv"], dim=1)
            layer.self_attention.linear_qkv.weight.copy_(qkv.flatten(0, 2))
            layer.self_attention.linear_proj.weight.copy_(w[f"{p}attention.out.weight"])
            layer.mlp.linear_fc1.weight.copy_(w[f"{p}mlp.up.weight"])
            layer.mlp.linear_fc2.weight.copy_(w[f"{p}mlp.down.weight"])
    del w
    model = model.to(device).train()
    positions = torch.arange(args.sequence, device=device).expand(args.batch, -1)
    mask = torch.ones(1, 1, args.sequence, args.sequence, dtype=torch.bool, device=device).triu(1)
    return train(args, model, lambda: model(ids, positions, mask, labels=labels).mean())


def limit(args: argparse.Namespace, device: torch.device, ids: Tensor, labels: Tensor) -> Step:
    """Only the products: each forward, by its input and by its weight; attention's over the causal half of the keys."""
    h, tokens, dtype = args.hidden_size, args.batch * args.sequence, getattr(torch, args.dtype)
    shapes = [(h, h)] * 4 + [(h, 4 * h), (4 * h, h)]
    products = []
    for inner, outer in shapes * args.num_layers:
        products += [(tokens, inner, outer), (tokens, outer, inner), (inner, tokens, outer)]
    # The head in chunks, as a chunked loss does it: a whole one would not fit in every memory
    rows, chunks = (
        1024,
        max(1, tokens // 1024),
    )
    products += [(rows, h, args.vocab_size), (rows, args.vocab_size, h), (args.vocab_size, rows, h)] * chunks
    made = {
        shape: (
            torch.randn(shape[0], shape[1], device=device, dtype=dtype),
            torch.randn(shape[1], shape[2], device=device, dtype=dtype),
        )
        for shape in set(products)
    }
    outputs = {shape: torch.empty(shape[0], shape[2], device=device, dtype=dtype) for shape in made}
    heads, width, half = args.batch * args.heads, h // args.heads, args.sequence // 2
    q = torch.randn(heads, args.sequence, width, device=device, dtype=dtype)
    k, scores = (
        torch.randn(heads, half, width, device=device, dtype=dtype),
        torch.randn(heads, args.sequence, half, device=device, dtype=dtype),
    )

    def step() -> None:
        for shape in products:
            torch.mm(*made[shape], out=outputs[shape])
        for _ in range(3 * args.num_layers):  # forward, and twice as much backward
            torch.bmm(q, k.transpose(1, 2))
            torch.bmm(scores, k)

    return step


BUILDERS = {
    "megalith": ours,
    "megalith-compile": lambda *a: ours(*a, compile=True),
    "hf": hugging_face,
    "hf-compile": lambda *a: hugging_face(*a, compile=True),
    "megatron-core": megatron_core,
    "limit": limit,
}
