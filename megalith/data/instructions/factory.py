"""How the datasets `chat` and `completion` are made from a run's config: template, tokens, rows."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from megalith.common.encodings import conversion_advice
from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.corpus.inputs import format_by_name
from megalith.data.corpus.unusable import parse_limit, require_usable
from megalith.data.instructions.dataset import InstructionDataset, PackedDataset, PairDataset, WeightedDataset
from megalith.data.instructions.encode import ChatEncoder, CompletionEncoder, turn_end
from megalith.data.instructions.records import Chat, read_chat, read_completion
from megalith.data.instructions.store import InstructionStore, Reader, Stores, open_store
from megalith.data.samples.index_cache import cache_key, default_folders
from megalith.data.sources import parse_weighted
from megalith.data.tasks.dataset import names_of
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class InstructionFactory:
    """What data/build.py asks of the dataset of a task's files, and how their chats or completions are read."""

    chats: bool  # else completions

    def prepare_tokenizer(self, config: RunConfig, tokenizer: Tokenizer) -> list[str]:
        """Give the tokenizer the template of --chat-template, and make the token that ends a turn its end of text.

        So checkpoints have both, generation stops there, and exports name it. Lines that say what has changed.
        Raises ConfigError where there is no template, DataError where it is no Jinja or the tokenizer cannot change.
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
        template.check(name)
        end = turn_end(template)
        before = tokenizer.eos if config.model.architecture.decoder else tokenizer.eod
        if end is None or end == before:
            return []
        tokenizer.end_texts_with(end)
        now, then = (None if i is None else template.backend.id_to_token(i) for i in (end, before))
        return [f"the chat template ends a turn with {now}: it takes the place of {then} as the token that ends a text"]

    def open_files(self, config: RunConfig, tokenizer: Tokenizer) -> tuple[Any, dict[str, InstructionDataset]]:
        """The dataset of --train-data, None where nothing is trained, and one for each path of --valid-data by name.

        Files to train on without weights are one dataset, each sample once an epoch; with weights they are blended.
        """
        f, reader = config.finetuning, self._reader(config, tokenizer)

        def dataset(paths: Sequence[str], **options: Any) -> InstructionDataset:
            stores = self._stores([file for path in paths for file in files_of(path)], reader, config)
            return self._dataset(stores, config, tokenizer, options)

        train: InstructionDataset | WeightedDataset | None = None
        if not config.validation.skip_train:
            sources = parse_weighted(f.train_data, "--train-data")
            if not sources:
                rule, cure = "must name the files to train on", "Write --train-data FILE"
                raise ConfigError(problem("--train-data", Words("nothing"), rule, cure))
            if sources[0].weight is None:
                train = dataset([source.prefix for source in sources], decode=tokenizer.decode)
            else:
                parts = [dataset([source.prefix], decode=tokenizer.decode) for source in sources]
                train = WeightedDataset(parts, [source.weight or 0.0 for source in sources])
        return train, {name: dataset([path]) for name, path in zip(names_of(f.valid_data), f.valid_data)}

    def _stores(self, files: Sequence[str], reader: Reader, config: RunConfig) -> Stores:
        """Some files as one; lines that cannot be used are listed, or an error beyond --max-unusable."""
        data, stores, notes = config.data, list[InstructionStore](), list[str]()
        for file in files:
            store = open_store(file, reader, default_folders(file, data.data_cache_path, config.run_folder))
            report = store.report
            limit = parse_limit(data.max_unusable)
            require_usable(report.unusable, report.total, limit, report.examples, file, "Correct the file")
            notes += [f"{file}: {line}" for line in report.notes] + [f"skipped {line}" for line in report.examples]
            if report.unusable:
                advice = conversion_advice(report.examples)
                skipped = f"{file}: {report.unusable} of {report.total} lines cannot be used and are skipped. {advice}"
                notes.append(skipped.rstrip(". "))
            stores.append(store)
        return Stores(stores, notes)

    def _dataset(
        self, stores: Stores, config: RunConfig, tokenizer: Tokenizer, options: dict[str, Any]
    ) -> InstructionDataset:  # fmt: skip
        """The dataset that fits the model: rows of a decoder, or pairs for an encoder and a decoder."""
        data = config.data
        pad = next(i for i in (tokenizer.pad, tokenizer.eod, tokenizer.eos, 0) if i is not None)
        options |= {
            "seq_length": data.seq_length or 0, "seed": config.batch.seed, "pad": pad,
            "excess_length_strategy": data.excess_length_strategy,
        }  # fmt: skip
        if config.model.architecture.decoder:
            length = data.decoder_seq_length or data.seq_length
            pair = {"decoder_seq_length": length, "start": tokenizer.decoder_start}
            return PairDataset(stores, **options, **pair)
        return PackedDataset(stores, **options, pack=data.packing)

    def _reader(self, config: RunConfig, tokenizer: Tokenizer) -> Reader:
        decoder, answers = config.model.architecture.decoder, config.data.assistant_only_loss
        if not self.chats:
            completions = CompletionEncoder(tokenizer, decoder=decoder, assistant_only=answers)
            key = cache_key("completion", tokenizer.fingerprint(), completions.end, decoder, answers)
            return Reader(lambda record, notice: [read_completion(record, notice)], completions, key)
        template, end = _template(tokenizer), tokenizer.require("eos" if decoder else "eod")
        encoder = ChatEncoder(template, end, answers)
        key = cache_key(
            "chat", tokenizer.fingerprint(), template.source, template.special_tokens, end, decoder, answers
        )

        def parse(record: dict[str, Any], notice: Callable[[str], object]) -> Sequence[Chat]:
            chat = read_chat(record, notice)
            return turns(chat) if decoder else [chat]

        return Reader(parse, encoder, key)


def files_of(path: str) -> list[str]:
    """The file, or those of a folder whose names say that they hold JSON lines, in order."""
    if not os.path.isdir(path):
        return [path]
    found = sorted(str(each) for each in pathlib.Path(path).iterdir() if format_by_name(each.name)[0] == "json")
    if not found:
        rule, cure = "must name a file of JSON lines, or a folder with some", "Correct the path"
        raise DataError(problem("The data", Words(f"the folder {path}, with none"), rule, cure))
    return found


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


chat = InstructionFactory(chats=True)
completion = InstructionFactory(chats=False)
