"""Files of tiny tasks with something to learn, and runs on them."""

import json
import pathlib

import numpy as np

from megalith.config.finetuning import task_defaults
from megalith.config.run import RunConfig

WORDS = [f"w{number}" for number in range(30)]
LABELS = ("contradiction", "entailment", "neutral")
HEADER = "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\tgold_label"


def write_vocabulary(folder: pathlib.Path) -> None:
    """vocab.txt of WordPiece."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", ".", *WORDS]))


def write_pairs(path: pathlib.Path, count: int, seed: int, labelled: bool = True) -> None:
    """A file as MNLI's: the label is that of the second sentence's first word, modulo 3."""
    random, lines = np.random.RandomState(seed), [HEADER if labelled else HEADER.removesuffix("\tlabel1\tgold_label")]
    for number in range(count):
        first, second = (random.randint(0, 30, random.randint(2, 6)) for _ in range(2))
        texts = [" ".join(WORDS[word] for word in words) for words in (first, second)]
        label = LABELS[second[0] % 3]
        cells = [str(number), "x", "x", "x", "x", "x", "x", "x", *texts, *([label, label] if labelled else [])]
        lines.append("\t".join(cells))
    path.write_text("\n".join(lines) + "\n")


def write_articles(folder: pathlib.Path, count: int, seed: int, answers: bool = True) -> None:
    """A folder as RACE's: articles of two questions; the answer is the option that stands in the article."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for number in range(count):
        words = random.permutation(30)
        right = random.randint(0, 4, 2)
        options = [[f"{WORDS[words[20 + 4 * q + n]]}" for n in range(4)] for q in range(2)]
        article = " ".join([options[q][right[q]] for q in range(2)] * 2)
        article = f"{article} . {' '.join(WORDS[word] for word in words[:4])} ."
        record = {"article": article, "questions": ["a _ .", "a w1"], "options": options}
        if answers:
            record["answers"] = ["ABCD"[each] for each in right]
        (folder / f"{seed}-{number}.txt").write_text(json.dumps(record) + "\n")


def write_all(folder: pathlib.Path) -> pathlib.Path:
    """train.tsv of 23 pairs, dev_matched.tsv of 9, dev_mismatched.tsv of 5, test.tsv of 4 without labels; RACE/...

    nq-train.json of 25 questions, 20 of which have an answer, and nq-dev.json of 10, 8 of which have one.
    """
    write_vocabulary(folder)
    for name, count, seed in (("train", 23, 1), ("dev_matched", 9, 2), ("dev_mismatched", 5, 3)):
        write_pairs(folder / f"{name}.tsv", count, seed)
    write_pairs(folder / "test.tsv", 4, 4, labelled=False)
    for name, count, seed in (("train/middle", 5, 5), ("dev/middle", 2, 6), ("dev/high", 3, 7)):
        write_articles(folder / "RACE" / name, count, seed)
    for name, count, seed in (("train", 25, 8), ("dev", 10, 9)):
        write_questions(folder / f"nq-{name}.json", count, seed)
    return folder


def task_config(folder: pathlib.Path, run: pathlib.Path | str, task: str = "mnli", **changes) -> RunConfig:
    """A small run on the files of `write_all`: batches of 8 in micro-batches of 2, dropout on."""
    data = {
        "mnli": {
            "train_data": [str(folder / "train.tsv")],
            "valid_data": [str(folder / f"{name}.tsv") for name in ("dev_matched", "dev_mismatched")],
        },
        "race": {
            "train_data": [str(folder / "RACE/train/middle")],
            "valid_data": [str(folder / "RACE/dev" / name) for name in ("middle", "high")],
        },
        "nq": {
            "train_data": [str(folder / "nq-train.json")],
            "valid_data": [str(folder / "nq-dev.json")],
            "biencoder_projection_dim": 16,
            "train_with_neg": True,
            "train_hard_neg": 1,
            "val_av_rank_hard_neg": 2,
            "val_av_rank_other_neg": 1,
        },
    }
    values = dict(
        **task_defaults(task),
        **data.get(task, {}),
        task=task,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=24,
        max_position_embeddings=24,
        tokenizer_type="BertWordPieceLowerCase",
        vocab_file=str(folder / "vocab.txt"),
        micro_batch_size=2,
        global_batch_size=8,
        epochs=2.0,
        lr=5e-3,
        lr_warmup_fraction=0.1,
        log_interval=1,
        run_dir=str(run),
        progress="none",
        device="cpu",
    )
    return RunConfig().replace(**(values | changes))


def table(path: pathlib.Path) -> list[list[str]]:
    """The rows of a .tsv below its first line."""
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def write_questions(path: pathlib.Path, count: int, seed: int) -> None:
    """DPR's JSON: a question of two words, which a passage with the answer has too; hard negatives have one of them.

    Every third question has no hard negative, every fifth no passage with the answer.
    """
    random, entries = np.random.RandomState(seed), []

    def passage(*words: int) -> dict[str, str]:
        return {"title": WORDS[words[0]], "text": " ".join(WORDS[word] for word in words)}

    for number in range(count):
        one, two, *others = random.permutation(30).tolist()
        entries.append({
            "question": f"{WORDS[one]} {WORDS[two]}", "answers": [WORDS[others[0]]],
            "positive_ctxs": [passage(one, two, others[0])] * (number % 5 > 0),
            "hard_negative_ctxs": [passage(one, *others[1:4]), passage(two, *others[4:6])] * (number % 3 > 0),
            "negative_ctxs": [passage(*others[6:9]), passage(*others[9:12]), passage(*others[12:15])],
        })  # fmt: skip
    path.write_text(json.dumps(entries))
