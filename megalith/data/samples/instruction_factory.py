"""How the datasets `chat` and `completion` are made from a run's config: template, tokens, rows."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megalith.common.encodings import conversion_advice
from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.corpus.unusable import parse_limit, require_usable
from megalith.data.instructions.encode import ChatEncoder, CompletionEncoder, turn_end
from megalith.data.instructions.records import Chat, read_chat, read_completion
from megalith.data.instructions.store import InstructionStore, Reader, open_store
from megalith.data.samples.index_cache import cache_key
from megalith.data.samples.instruction_dataset import InstructionDataset, PackedDataset, PairDataset
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class InstructionFactory:
    """Called by data/build.py as any dataset of the registry is, on what its own `open` made of a path."""

    chats: bool  # else completions

    def prepare_tokenizer(self, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
        """Give the tokenizer the template of --chat-template, and make the token that ends a turn its end of text.

        So checkpoints have both, generation stops there, and exports name it. Lines that say what has changed.
        Raises ConfigError where there is no template, DataError where it ends no turn or the tokenizer cannot change.
        """
        file = config.data.chat_template
        if file is not None:
            try:
                tokenizer.chat_template = pathlib.Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                rule = f"must name a text file with a template in Jinja ({error})"
                raise ConfigError(problem("--chat-template", file, rule, "Correct the path")) from None
        if not self.chats:
            return []
        template = _template(tokenizer)
        name = "--chat-template" if file is not None else "The tokenizer's chat template"
        try:
            end = turn_end(template)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        before = tokenizer.eos if config.model.architecture.decoder else tokenizer.eod
        if end is None or end == before:
            return []
        tokenizer.end_texts_with(end)
        now, then = (None if i is None else template.backend.id_to_token(i) for i in (end, before))
        return [f"the chat template ends a turn with {now}: it takes the place of {then} as the token that ends a text"]

    def open(
        self, path: str, config: RunConfig, tokenizer: Tokenizer, folders: Sequence[str | os.PathLike]
    ) -> InstructionStore:
        """The samples of a file; lines that cannot be used are told, or are an error beyond --max-unusable."""
        store = open_store(path, self._reader(config, tokenizer), folders)
        report, limit = store.report, parse_limit(config.data.max_unusable)
        require_usable(report.unusable, report.total, limit, report.examples, path, "Correct the file")
        for line in report.told:
            warnings.warn(f"{path}: {line}", stacklevel=2)
        for line in report.examples:
            warnings.warn(f"skipped {line}", stacklevel=2)
        if report.unusable:
            advice = conversion_advice(report.examples)
            skipped = f"{path}: {report.unusable} of {report.total} lines cannot be used and are skipped. {advice}"
            warnings.warn(skipped.rstrip(". "), stacklevel=2)
        return store

    def _reader(self, config: RunConfig, tokenizer: Tokenizer) -> Reader:
        decoder, answers = config.model.architecture.decoder, config.data.assistant_only_loss
        if not self.chats:
            completions = CompletionEncoder(tokenizer, decoder=decoder, assistant_only=answers or decoder)
            key = cache_key("completion", tokenizer.fingerprint(), completions.end, decoder, answers)
            return Reader(lambda record, told: [read_completion(record, told)], completions, key)
        template, end = _template(tokenizer), tokenizer.require("eos" if decoder else "eod")
        encoder = ChatEncoder(template, end, answers or decoder)
        key = cache_key(
            "chat", tokenizer.fingerprint(), template.source, template.special_tokens, end, decoder, answers
        )

        def parse(record: dict[str, Any], told: Callable[[str], object]) -> Sequence[Chat]:
            chat = read_chat(record, told)
            return turns(chat) if decoder else [chat]

        return Reader(parse, encoder, key)

    def __call__(
        self, indexed: InstructionStore, documents: tuple[int, int] | None, num_samples: int | None, *,
        config: RunConfig, tokenizer: Tokenizer, seed: int, cache_folders: Sequence[str | os.PathLike] = (),
    ) -> InstructionDataset:  # fmt: skip
        """The dataset over these samples of a store."""
        data = config.data
        pad = next(i for i in (tokenizer.pad, tokenizer.eod, tokenizer.eos, 0) if i is not None)
        options = {
            "seq_length": data.seq_length or 0, "seed": seed, "pad": pad, "decode": tokenizer.decode,
            "excess_length_strategy": data.excess_length_strategy,
        }  # fmt: skip
        if config.model.architecture.decoder:
            length = data.decoder_seq_length or data.seq_length
            pair = {"decoder_seq_length": length, "start": tokenizer.decoder_start}
            return PairDataset(indexed, documents, num_samples, **options, **pair)
        return PackedDataset(indexed, documents, num_samples, **options, pack=data.packing)


def turns(chat: Chat) -> list[Chat]:
    """A chat for each trained turn, which ends with it: an encoder reads what is before, and a decoder writes it."""
    answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    return [
        Chat(chat.messages[: number + 1], chat.variables, [False] * place + [True], chat.weight)
        for place, number in enumerate(answers) if chat.trained[place]
    ]  # fmt: skip


def _template(tokenizer: Tokenizer) -> ChatTemplate:
    template = ChatTemplate.of(tokenizer)
    if template is None:
        rule = "must name a file with a chat template in Jinja, as the tokenizer has none"
        cure = "Write --chat-template FILE, or finetune on completions, which need no template"
        raise ConfigError(problem("--chat-template", Words("nothing"), rule, cure))
    return template


chat, completion = InstructionFactory(chats=True), InstructionFactory(chats=False)
