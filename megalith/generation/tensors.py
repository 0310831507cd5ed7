"""Text generation with tensors in and out, as `megatron_generate` of Accelerate's Megatron-LM plugin had it."""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.generate import Model, as_model, as_text_model, complete


def generate_tokens(
    model: Model, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_length: int | None = None,
    max_new_tokens: int | None = None, num_beams: int | None = None, temperature: float | None = None,
    top_k: int | None = None, top_p: float | None = None, length_penalty: float | None = None,
    top_p_decay: float = 0.0, top_p_bound: float = 0.0, add_BOS: bool = False, stop_token: int | None = None,
    random_seed: int | None = 0, batch_size: int = 32,
) -> Tensor:  # fmt: skip
    """Prompts and what a decoder-only model writes after them, int64 [b, t], on the device of input_ids.

    input_ids: int64 [b, s]. attention_mask: [b, s], 1 where a token of the prompt is and 0 where padding is, on the
    right or on the left; None where there is no padding. Each row of the result is a prompt without padding (with the
    end-of-document token before it for add_BOS), then its new tokens up to the one that ended it, then padding to the
    longest row: end-of-document tokens, or stop_token for a model without a tokenizer.

    max_new_tokens: most new tokens of each row; else max_length - s. num_beams: beam search, for several prompts too;
    the result is the best of each. temperature, top_k, top_p, top_p_decay, top_p_bound, length_penalty: as in
    GenerationParams; None for their default. stop_token: ends a row, instead of the end-of-document token. random_seed:
    the same seed gives the same tokens; None draws one. batch_size: see `complete`.

    Raises ConfigError for tensors of other shapes, for a mask with holes, for an encoder-decoder, and for options that
    cannot work; DataError for unknown tokens.
    """
    model = as_model(model)
    text = as_text_model(model)
    pad = text.end_token if text.end_token is not None else stop_token
    if text.config.decoder_layers:
        raise ConfigError(problem("The model", "t5", "must be decoder-only for tensors of tokens", "Use complete"))
    if pad is None:
        rule = "must be given for a model without a tokenizer, because it pads the result"
        raise ConfigError(problem("stop_token", None, rule, "Give a token number"))
    if max_new_tokens is None:
        if max_length is None:
            rule = "must be given"
            raise ConfigError(problem("max_new_tokens or max_length", Words("neither"), rule, "Give max_new_tokens"))
        max_new_tokens = max_length - input_ids.shape[-1]
        if max_new_tokens < 0:
            rule = f"must be at least the width of input_ids, {input_ids.shape[-1]}"
            raise ConfigError(problem("max_length", max_length, rule, "Give more, or give max_new_tokens"))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "length_penalty": length_penalty}
    completions = complete(
        model, unpad(input_ids, attention_mask), batch_size=batch_size,
        max_new_tokens=max_new_tokens, beam_width=num_beams, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        add_bos=add_BOS, stop_token_ids=() if stop_token is None else stop_token, stop_at_eod=stop_token is None,
        seed=random_seed, **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    rows = [torch.tensor(each.prompt_ids + each.ids) for each in completions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, pad) if rows else torch.zeros(0, 0, dtype=torch.int64)
    return padded.to(input_ids.device)


def unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row of input_ids [b, s] without padding; see `generate_tokens`."""
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        found = Words(f"{input_ids.dtype} {list(input_ids.shape)}")
        raise ConfigError(problem("input_ids", found, "must be whole numbers [b, s]", "Give one row for each prompt"))
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        rule = f"must have the shape of input_ids, {list(input_ids.shape)}"
        raise ConfigError(problem("attention_mask", list(attention_mask.shape), rule, "Pass what the tokenizer gave"))
    prompts = []
    for number, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist())):
        kept = [position for position, is_token in enumerate(mask) if is_token]
        if kept and (kept[-1] - kept[0] >= len(kept) or (kept[0] > 0 and kept[-1] < len(mask) - 1)):
            rule = "must have its zeros at one end of a row, where padding is"
            found = Words(f"{attention_mask[number].tolist()} in row {number}")
            raise ConfigError(problem("attention_mask", found, rule, "Pass what the tokenizer gave"))
        prompts.append([ids[position] for position in kept])
    return prompts
