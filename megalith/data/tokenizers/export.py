"""The files from which transformers' AutoTokenizer makes a tokenizer that gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.huggingface import HuggingFaceTokenizer, template_processing
from megalith.data.tokenizers.settings import default_template
from megalith.data.tokenizers.tokenizer import Tokenizer

EXPORTED_SPECIAL_TOKENS = ("bos", "eos", "pad", "cls", "sep", "mask")
# copied from the tokenizer_config.json of the source
KEPT_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "unk_token")
# What is compared: runs of spaces, controls, composed characters, scripts, names of special tokens.
SAMPLES = (
    "", " ", "Hello world, it is 12.5!", "  two  spaces ", "a\tb\nc\r\n", "na\u00efve e\u0301 \ufb01 \uff21",
    "\u4e2d\u6587 \u0391\u03b2", "\U0001f642 ok", "don't (stop) HTTPServer __init__",
    "<s> </s> <unk> <pad> [SEP] [CLS] <|endoftext|> <extra_id_0> <0x41>",
)  # fmt: skip


def transformers_files(tokenizer: Tokenizer, *, causal: bool = True, decoder: bool = False) -> dict[str, bytes]:
    """{name: content} of tokenizer.json and tokenizer_config.json.

    There the eos token is the end of document, or where a decoder follows an encoder (T5) the tokenizer's eos; texts of
    models that are not causal (BERT) get [CLS] and [SEP], as in training.
    Raises DataError where no such files give the ids that `tokenizer` gives.
    """
    backend = tokenizer.to_huggingface()
    names = {part: getattr(tokenizer, part) for part in EXPORTED_SPECIAL_TOKENS}
    if not decoder and tokenizer.eod is not None:
        names["eos"] = tokenizer.eod
    listed = tokenizer.tokens()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for part, end in (("bos", "prefix"), ("eos", "suffix")):  # what is added to a text is that, named or not
        added = set(getattr(tokenizer, end, ())) - set(names.values())
        if names[part] is None and len(added) == 1 and (tokenizer.split_special_tokens or listed[min(added)] in known):
            names[part] = added.pop()  # else its name in a text would become it, unlike in preprocessing
    special = {part: listed[i] for part, i in names.items() if i is not None}
    backend.add_special_tokens([token for token in dict.fromkeys(special.values()) if token not in known])
    backend.encode_special_tokens = tokenizer.split_special_tokens
    _check_same_ids(tokenizer, {text: backend.encode(text).ids for text in _samples(tokenizer)})
    wrong = {token: i for part, token in special.items() if backend.token_to_id(token) != (i := names[part])}
    if wrong or backend.get_vocab_size() > tokenizer.vocab_size:
        rule = "must have one name and one id each, those of the vocabulary"
        found = wrong or Words("more of them")
        raise DataError(problem("The tokens of tokenizer.json", found, rule, "Use the tokenizer through megalith"))
    if not causal and tokenizer.cls is not None and tokenizer.sep is not None and backend.post_processor is None:
        backend.post_processor = template_processing(backend, tokenizer.cls, tokenizer.sep, repeat_in_pair=False)
    settings = tokenizer.settings if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    config = {
        # this class reads tokenizer.json as it is; those of models build parts of it anew
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": tokenizer.split_special_tokens,
        **{key: settings[key] for key in KEPT_SETTINGS if key in settings},
        **({} if tokenizer.chat_template is None else {"chat_template": _template(tokenizer, settings)}),
        **{f"{part}_token": token for part, token in special.items()},
    }
    files = {"tokenizer.json": json.loads(backend.to_str()), "tokenizer_config.json": config}
    return {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in files.items()
    }


def _template(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Any:
    """The tokenizer's template, with others beside it where its source has several by name."""
    several = settings.get("chat_template")
    return several if default_template(several) == tokenizer.chat_template else tokenizer.chat_template


def _samples(tokenizer: Tokenizer) -> list[str]:
    """SAMPLES, or numbers for a tokenizer that reads numbers."""
    try:
        tokenizer.encode(SAMPLES[2])
    except DataError:
        return ["", "0", f" 1  {tokenizer.vocab_size - 1}\n0 007"]
    return list(SAMPLES)


def _check_same_ids(tokenizer: Tokenizer, exported: dict[str, list[int]]) -> None:
    for text, ids in exported.items():
        if ids != (expected := list(tokenizer.encode(text))):
            kind = tokenizer.options.tokenizer_type
            rule, found = f"must be those of {kind}", Words(f"{ids[:12]} for {text!r}, where it gives {expected[:12]}")
            raise DataError(problem("The ids of tokenizer.json", found, rule, "Use the tokenizer through megalith"))
