"""The files from which transformers' AutoTokenizer makes a tokenizer that gives our ids."""

from __future__ import annotations

import json

from megalith.common.errors import DataError, problem
from megalith.data.tokenizers.huggingface import HuggingFaceTokenizer, template
from megalith.data.tokenizers.tokenizer import Tokenizer

PARTS = ("bos", "eos", "pad", "cls", "sep", "mask")
KEPT = (
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "unk_token",
)  # of the tokenizer_config.json it came from
# What is compared: runs of spaces, controls, composed characters, scripts, names of special tokens.
SAMPLES = (
    "", " ", "Hello world, it is 12.5!", "  two  spaces ", "a\tb\nc\r\n", "na\u00efve e\u0301 \ufb01 \uff21", "\u4e2d\u6587 \u0391\u03b2",
    "\U0001f642 ok", "<s> </s> <unk> <pad> [SEP] [CLS] <|endoftext|> <extra_id_0> <0x41>", "don't (stop) HTTPServer __init__",
)  # fmt: skip


def transformers_files(tokenizer: Tokenizer, *, causal: bool = True, decoder: bool = False) -> dict[str, bytes]:
    """{name: content} of tokenizer.json and tokenizer_config.json.

    What ends a text is there the end of document, or where a decoder answers an encoder (T5) its eos; texts of
    models that are not causal (BERT) get [CLS] and [SEP], as in training.
    Raises DataError where no such files give the ids that `tokenizer` gives.
    """
    backend = tokenizer.library()
    names = {part: getattr(tokenizer, part) for part in PARTS}
    if not decoder and tokenizer.eod is not None:
        names["eos"] = tokenizer.eod
    listed = tokenizer.tokens()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for part, around in (("bos", "prefix"), ("eos", "suffix")):  # what is put round a text is that, named or not
        added = set(getattr(tokenizer, around, ())) - set(names.values())
        if names[part] is None and len(added) == 1 and (tokenizer.literal or listed[min(added)] in known):
            names[part] = added.pop()  # else its name in a text would become it, as in preprocessing it does not
    special = {part: listed[i] for part, i in names.items() if i is not None}
    backend.add_special_tokens([token for token in dict.fromkeys(special.values()) if token not in known])
    backend.encode_special_tokens = tokenizer.literal
    _compare(tokenizer, {text: backend.encode(text).ids for text in _samples(tokenizer)})
    wrong = {token: i for part, token in special.items() if backend.token_to_id(token) != (i := names[part])}
    if wrong or backend.get_vocab_size() > tokenizer.vocab_size:
        rule = "a token of the vocabulary has one name and one id"
        raise DataError(
            problem("tokens of tokenizer.json", wrong or "more of them", rule, "Use the tokenizer through megalith")
        )
    if not causal and tokenizer.cls is not None and tokenizer.sep is not None and backend.post_processor is None:
        backend.post_processor = template(backend, tokenizer.cls, tokenizer.sep, again=False)
    settings = tokenizer.settings if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; classes of models build parts of it anew
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": tokenizer.literal,
        **{key: settings[key] for key in KEPT if key in settings},
        **{f"{part}_token": token for part, token in special.items()},
    }
    files = {"tokenizer.json": json.loads(backend.to_str()), "tokenizer_config.json": config}
    return {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in files.items()
    }


def _samples(tokenizer: Tokenizer) -> list[str]:
    """SAMPLES, or numbers for a tokenizer that reads numbers."""
    try:
        tokenizer.encode(SAMPLES[2])
    except DataError:
        return ["", "0", f" 1  {tokenizer.vocab_size - 1}\n0 007"]
    return list(SAMPLES)


def _compare(tokenizer: Tokenizer, made: dict[str, list[int]]) -> None:
    for text, ids in made.items():
        if ids != (expected := list(tokenizer.encode(text))):
            found = f"{ids[:12]} for {text!r}, where {tokenizer.options.tokenizer_type} gives {expected[:12]}"
            raise DataError(
                problem("ids of tokenizer.json", found, "both are the same", "Use the tokenizer through megalith")
            )
