"""Text generation with tensors in and out, as `megatron_generate` of Accelerate's Megatron-LM plugin had it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.generate import Model, as_model, as_text_model, complete


def generate_tokens(
    model: Model, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_length: int | None = None,
    max_new_tokens: int | None = None, num_beams: int | None = None, temperature: float | None = None,
    top_k: int | None = None, top_p: float | None = None, length_penalty: float | None = None,
    top_p_decay: float = 0.0, top_p_bound: float = 0.0, add_BOS: bool = False,
    stop_token: int | Sequence[int] | None = None, random_seed: int | None = 0, batch_size: int = 32,
    bos_token: int | None = None, pad_token: int | None = None,
) -> Tensor:  # fmt: skip
    """Prompts and what a model writes after them, or the answers of an encoder-decoder: int64 [b, t], on the device of
    input_ids.

    input_ids: int64 [b, s]. attention_mask: [b, s], 1 where a token of the prompt is and 0 where padding is, on the
    right or on the left; None where there is no padding. Each row of the result is a prompt without padding (with
    bos_token before it for add_BOS), or the token with which a decoder starts; then its new tokens up to the one that
    ended it, then pad_token to the longest row.

    max_new_tokens: most new tokens of each row; else max_length - s, or max_length - 1 of an encoder-decoder.
    num_beams: beam search, for several prompts too; the result is the best of each. temperature, top_k, top_p,
    top_p_decay, top_p_bound, length_penalty: as in GenerationParams; None for their default. stop_token: one or
    several, which end a row instead of the end-of-document token. random_seed: the same seed gives the same tokens;
    None draws one. batch_size: see `complete`. bos_token, pad_token: by default the end-of-document token, and for a
    model without a tokenizer the first stop_token as padding.

    Raises ConfigError for tensors of other shapes, for a mask with holes, and for options that cannot work; DataError
    for unknown tokens.
    """
    model = as_model(model)
    text, stops = as_text_model(model), () if stop_token is None else stop_token
    answers = bool(text.config.decoder_layers)
    candidates = [pad_token, text.end_token, *(stops if isinstance(stops, (list, tuple)) else [stops])]
    pad = next((token for token in candidates if token is not None), None)
    if pad is None:
        rule = "must be given for a model without a tokenizer, because it pads the result"
        raise ConfigError(problem("stop_token", None, rule, "Give a token number"))
    if max_new_tokens is None:
        max_new_tokens = new_tokens(max_length, 1 if answers else input_ids.shape[-1])
    prompts = unpad(input_ids, attention_mask)
    if bos_token is not None:
        prompts = [[bos_token, *ids] if add_BOS or not ids else ids for ids in prompts]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "length_penalty": length_penalty}
    completions = complete(
        model, prompts, batch_size=batch_size,
        max_new_tokens=max_new_tokens, beam_width=num_beams, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        add_bos=add_BOS if bos_token is None else False, stop_token_ids=stops, stop_at_eod=stop_token is None,
        seed=random_seed, **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    rows = [torch.tensor(([text.decoder_start] if answers else each.prompt_ids) + each.ids) for each in completions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, pad) if rows else torch.zeros(0, 0, dtype=torch.int64)
    return padded.to(input_ids.device)


def new_tokens(max_length: int | None, width: int) -> int:
    """Most new tokens of rows that are `width` tokens wide. Raises ConfigError where max_length does not say."""
    if max_length is None:
        rule = "must be given"
        raise ConfigError(problem("max_new_tokens or max_length", Words("neither"), rule, "Give max_new_tokens"))
    if max_length < width:
        rule = f"must be at least the width of input_ids, {width}"
        raise ConfigError(problem("max_length", max_length, rule, "Give more, or give max_new_tokens"))
    return max_length - width


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
