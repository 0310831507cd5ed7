"""From a config to the datasets of a run: counts, splits, blends, corpora, changes of weights, and early errors."""

import pathlib

import numpy as np
import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.config.run import RunConfig
from megalith.data import build
from megalith.data.build import blend_summary, build_datasets, sample_counts, source_usage, why_no_validation
from megalith.data.indexed import IndexedWriter
from megalith.data.indexed.tntidx import open_indexed

ORIGINAL = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "megatron"
needs_originals = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs the Megatron files of ../shared/data")


class StubTokenizer:
    """As much of a tokenizer as datasets need."""

    vocab_size, eod = 1000, 0


@pytest.fixture
def corpus(tmp_path):
    """Makes a dataset of documents that hold its number only, ended by 0; returns its prefix."""

    def make(name, number, documents=40, length=9):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add_sequence([number] * (length - 1) + [0])
                writer.end_document()
        return str(tmp_path / name)

    return make


def config(**values):
    base = {
        "split": "80,10,10",
        "seq_length": 8,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "train_iters": 20,
        "eval_interval": 10,
    }
    return RunConfig().replace(**{**base, "eval_iters": 2, "dataset": "gpt", **values})


def sample_sources(dataset, upto=None):
    """The source of each sample, which its tokens identify."""
    return [
        int(np.bincount(sample["input_ids"][sample["input_ids"] > 0]).argmax())
        for sample in map(dataset.__getitem__, range(upto or len(dataset)))
    ]


def test_counts_as_megatron_asks():
    assert sample_counts(config()) == (80, 24, 8)
    assert sample_counts(config(train_iters=None, train_samples=100)) == (100, 24, 8)
    assert sample_counts(config(global_batch_size=None), 3) == (120, 36, 12)
    assert sample_counts(config(train_iters=None)) == (0, 8, 8)


@needs_originals
def test_one_corpus_equal_to_megatron_core(tmp_path):
    class GPT2:
        vocab_size, eod = 50257, 50256

    for prefix in ("old22-gpt2bpe", "old22-gpt2bpe-cached"):
        options = {
            "seq_length": 64,
            "global_batch_size": 10,
            "train_iters": 500,
            "eval_interval": 27,
            "eval_iters": 1,
            "split": "900,80,20",
        }
        path = str(ORIGINAL / "indexed" / prefix)
        built = build_datasets(config(data_path=[path], data_cache_path=str(tmp_path), **options), GPT2())
        samples = np.load(ORIGINAL / "order" / "samples16.npz")
        assert len(built["train"]) == samples["train_len"]
        for index in range(16):
            assert np.array_equal(built["train"][index]["labels"], samples["train_labels"][index])


def test_splits_and_reports(corpus):
    built = build_datasets(config(data_path=[corpus("a", 1)], split="50,50,0"), StubTokenizer())
    assert built["test"] is None and len(built["train"]) >= 80 and len(built["valid"]) >= 24
    assert source_usage(built["train"]) == [
        {
            "prefix": source_usage(built["train"])[0]["prefix"],
            "corpus": "",
            "weight": None,
            "samples": 80,
            "tokens": 180,
            "epochs": 80 * 8 / 180,
        }
    ]
    assert build_datasets(config(data_path=[corpus("a", 1)], eval_iters=0), StubTokenizer())["valid"] is None
    assert build_datasets(config(data_path=[corpus("a", 1)], train_iters=0), StubTokenizer())["train"] is None


def test_reads_instead_of_maps(corpus):
    prefix = corpus("a", 1)
    mapped, read = (
        build_datasets(config(data_path=[prefix], mmap_bin_files=value), StubTokenizer(), rank=0, size=1)["train"]
        for value in (True, False)
    )
    for one, other in zip(mapped, map(read.__getitem__, range(len(mapped)))):
        assert all((one[name] == other[name]).all() for name in one)
    assert read.indexed.reader == "pread" and mapped.indexed.reader == "mmap"


def test_own_paths_for_each_split(corpus):
    built = build_datasets(config(train_data_path=[corpus("a", 1)], valid_data_path=[corpus("b", 2)]), StubTokenizer())
    assert (
        set(sample_sources(built["train"])) == {1}
        and set(sample_sources(built["valid"])) == {2}
        and built["test"] is None
    )
    assert built["train"].plan.end == 40


def test_weighted_blend(corpus):
    built = build_datasets(config(data_path=["0.3", corpus("a", 1), "0.7", corpus("b", 2)]), StubTokenizer())
    assert sample_sources(built["train"], 12) == [2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2] and len(built["train"]) == 80
    assert [(row["samples"], row["weight"]) for row in source_usage(built["train"])] == [(24, 0.3), (56, 0.7)]


def test_extreme_weights_never_run_out(corpus):
    paths = [part for number in range(1, 60) for part in ("1e-7", corpus(f"s{number}", number, 10))]
    built = build_datasets(
        config(data_path=["1", corpus("big", 99), *paths], split="100", train_iters=50), StubTokenizer()
    )
    assert (
        len(sample_sources(built["train"])) == 200
        and sum(row["samples"] for row in source_usage(built["train"])) == 200
    )


def test_unweighted_gives_in_proportion(corpus):
    prefixes = [corpus("a", 1, 10), corpus("b", 2, 30)]
    few = build_datasets(config(data_path=prefixes, split="1", train_iters=5), StubTokenizer())["train"]
    assert np.bincount(sample_sources(few))[1:].tolist() == [5, 15] and all(
        source.first.plan.epochs == 1 for source in few.datasets
    )
    many = build_datasets(
        config(data_path=[str(pathlib.Path(prefixes[0]).parent)], split="1", train_iters=40), StubTokenizer()
    )["train"]
    assert np.bincount(sample_sources(many))[1:].tolist() == [40, 120]


def test_file_list_groups_by_corpus(corpus, tmp_path):
    for name, number in (("a0", 1), ("b0", 2), ("a1", 3)):
        corpus(name, number)
    path = tmp_path / "list.txt"
    path.write_text("0.25 a0 A\n0.5 b0 B\n0.25 a1 A\n")
    plain = build_datasets(config(data_file_list=str(path)), StubTokenizer())["train"]
    order = sample_sources(plain)
    # Requested_samples(80, 1/4) is 21
    assert [kind for kind in order if kind != 2] == [1] * 21 + [3] * (order.count(1) + order.count(3) - 21)
    assert blend_summary(plain) == ["A: 40 samples, 0.556 epochs", "B: 40 samples, 1.11 epochs"] and blend_summary(
        plain, 1
    )[1:] == ["and 1 more"]
    assert order[:4] in ([1, 2, 1, 2], [2, 1, 2, 1]) and [row["corpus"] for row in source_usage(plain)] == [
        "A",
        "B",
        "A",
    ]
    mixed = sample_sources(
        build_datasets(config(data_file_list=str(path), blend_sample_in_corpus=True), StubTokenizer())["train"]
    )
    assert [kind for kind in mixed if kind != 2][:6] == [1, 3, 1, 3, 1, 3]
    shuffled = sample_sources(
        build_datasets(config(data_file_list=str(path), shuffle_sample_in_corpus=True), StubTokenizer())["train"]
    )
    assert shuffled != order and sorted(shuffled)[0] == 1


def test_weights_change_during_the_run(corpus, tmp_path):
    path = tmp_path / "weights.txt"
    path.write_text("# sample weights\n20 1 0\n40 0 1\n")
    options = {"data_path": ["1", corpus("a", 1), "1", corpus("b", 2)], "data_weights_schedule": str(path)}
    order = sample_sources(build_datasets(config(**options), StubTokenizer())["train"])
    assert order[:4] == [1, 2, 1, 2] and order[20:] == [1] * 20 + [2] * 40
    for text in ("20 1\n", "x 1 1\n", "20 1 1\n20 1 1\n", "0 1 1\n", "20 -1 2\n", "20 0 0\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"line [12]"):
            build_datasets(config(**options), StubTokenizer())


def test_scheduled_weights_are_of_all_sources_that_are_named(corpus, tmp_path):
    path = tmp_path / "weights.txt"
    path.write_text("8 1 1 2\n")
    few = corpus("few", 1, documents=2)  # none of them is for validation
    options = {"data_path": ["1", few, "1", corpus("b", 2), "0", corpus("c", 3)], "data_weights_schedule": str(path)}
    built = build_datasets(config(**options), StubTokenizer())
    assert np.bincount(sample_sources(built["train"], 24)[:8]).tolist() == [0, 4, 4] and np.bincount(
        sample_sources(built["train"], 24)
    ).tolist() == [
        0,
        8,
        8,
        8,
    ]
    assert set(sample_sources(built["valid"])) == {2}
    listed = tmp_path / "list.txt"
    listed.write_text("0.5 few A\n0.5 b B\n0 c C\n")
    built = build_datasets(config(data_file_list=str(listed), data_weights_schedule=str(path)), StubTokenizer())
    assert np.bincount(sample_sources(built["train"], 24)[:8]).tolist() == [0, 4, 4] and np.bincount(
        sample_sources(built["train"], 24)
    ).tolist() == [
        0,
        8,
        8,
        8,
    ]
    with pytest.raises(DataError, match="nowhere cannot be read"):
        build_datasets(config(**options | {"data_weights_schedule": "nowhere"}), StubTokenizer())


def test_another_tokenizers_data_is_refused_at_the_start(corpus):
    path = corpus("a", 1000)
    with pytest.raises(DataError, match=r"a, sequence 0 holds token 1000, but StubTokenizer has ids 0 to 999"):
        build_datasets(config(data_path=[path]), StubTokenizer())
    hidden = open_indexed(path)
    from megalith.data.samples.gpt_dataset import GPTDataset

    with pytest.raises(DataError, match="tokens 0 to 1000, but the vocabulary has 1000"):
        GPTDataset(hidden, None, 1, seq_length=8, vocab_size=1000)[0]


def test_warnings(corpus, tmp_path):
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_many(np.ones(90), np.full(30, 3), np.full(10, 3))
    with pytest.warns(UserWarning, match="split into sentences"):
        build_datasets(config(data_path=[str(tmp_path / "s")]), StubTokenizer())
    with IndexedWriter(tmp_path / "n", np.uint16) as writer:
        writer.add_many(np.ones(90), np.full(30, 3))
    with pytest.warns(UserWarning, match="append-eod"):
        build_datasets(config(data_path=[str(tmp_path / "n")], reset_position_ids=True), StubTokenizer())
    with IndexedWriter(tmp_path / "f", np.float64) as writer:
        writer.add_many(np.ones(90), np.full(30, 3))
    with pytest.raises(DataError, match="no token ids"):
        build_datasets(config(data_path=[str(tmp_path / "f")]), StubTokenizer())


def test_a_dataset_of_the_users_own(corpus, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def squares(indexed, documents, num_samples, *, config, tokenizer, seed, cache_folders):\n"
        "    return [{'input_ids': [n * n, seed]} for n in range(num_samples)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for paths in ([], [corpus("b", 1)]):
        built = build_datasets(config(dataset="mine:squares", split="1", data_path=paths), StubTokenizer())
    assert built["train"][3] == {"input_ids": [9, 1234]} and len(built["train"]) == 80
    with pytest.raises(ConfigError, match="unknown dataset 'gtp'"):
        build_datasets(config(dataset="gtp"), StubTokenizer())
    with pytest.raises(ConfigError, match="--seq-length"):
        build_datasets(config(seq_length=None, data_path=[corpus("a", 1)]), StubTokenizer())


@pytest.mark.filterwarnings("error")
def test_an_empty_dataset_is_named_and_its_weight_given_to_nobody(corpus, tmp_path):
    full, other = corpus("full", 1), corpus("other", 2)
    for name in ("none", "bare"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(3 * (name == "bare")):
                writer.add_sequence([])
                writer.end_document()
    none, bare = str(tmp_path / "none"), str(tmp_path / "bare")
    for empty in (none, bare):
        for paths in (["0.5", full, "0.5", empty], ["1", empty]):
            with pytest.raises(
                DataError,
                match=f"must hold tokens, because the weight of an empty one .*; found no tokens in {empty} .weight",
            ):
                build_datasets(config(data_path=paths), StubTokenizer())
        with pytest.raises(DataError, match=f"The datasets must hold tokens; found none in {empty} .[03] documents"):
            build_datasets(config(data_path=[empty]), StubTokenizer())
        with pytest.raises(UserWarning, match=f"no tokens in {empty} .*, so no samples come from there"):
            build_datasets(config(data_path=[full, other, empty]), StubTokenizer())
        with pytest.raises(DataError, match="must hold tokens"):
            build_datasets(
                config(train_data_path=[full], valid_data_path=["1", empty, "1", other], data_path=[]), StubTokenizer()
            )
    (tmp_path / "list").write_text(f"0.5 {full} a\n0.5 {none} b\n")
    with pytest.raises(DataError, match=r"none \(weight 0.5\)"):
        build_datasets(config(data_file_list=str(tmp_path / "list")), StubTokenizer())
    few = corpus("few", 3, documents=2)
    with pytest.raises(
        UserWarning, match=f"--split '80,10,10' leaves no document of {few} .2 documents, weight 0.25. for valid"
    ):
        build_datasets(config(data_path=["0.75", full, "0.25", few]), StubTokenizer())
    assert (
        build_datasets(config(data_path=["0.75", full, "0.25", few], split="100,0,0"), StubTokenizer())["valid"] is None
    )
    with pytest.raises(
        UserWarning, match=f"leaves no document of {few} .2 documents. for valid; it reads the others alone"
    ):
        build_datasets(config(data_path=[full, few]), StubTokenizer())


def test_more_samples_than_memory_has_room_for(corpus, monkeypatch):
    monkeypatch.setattr(build, "available_memory", lambda: 24 * 1000)
    few = config(data_path=[corpus("a", 3)], eval_iters=1, eval_interval=10)
    train, valid, _ = sample_counts(few)
    assert max(train, valid) <= 1000
    build_datasets(few, StubTokenizer())
    expected = (
        r"Samples for valid need an index of about .*, and 23\.44 KiB of memory are free; found \d+\. "
        "Lower --eval-iters, 1000000, or raise --eval-interval"
    )
    with pytest.raises(ConfigError, match=expected):
        build_datasets(few.replace(eval_iters=10**6), StubTokenizer())
    with pytest.raises(ConfigError, match=r"Samples for train need .*Lower the length of the run"):
        build_datasets(few.replace(train_iters=10**6), StubTokenizer())


@pytest.mark.parametrize(
    ("documents", "changes", "said"),
    [
        (
            [1],
            {"split": "90,10,0"},
            "of 1 document --split '90,10,0' leaves none for it. A plain-text file is one document, what",
        ),
        (
            [1, 1],
            {"split": "90,10,0"},
            "of 2 documents in 2 datasets --split '90,10,0' leaves none for it. A plain-text file is one",
        ),
        (
            [3],
            {"split": "90,10,0"},
            "of 3 documents --split '90,10,0' leaves none for it. Raise its second number, or name other",
        ),
        (
            [3],
            {"split": "1"},
            "--split '1' has no second number above 0. Add one, or name other data with --train-data-path",
        ),
        (
            [3],
            {"train_data_path": True},
            "no validation data, so nothing is validated; name some with --valid-data-path",
        ),
    ],
)
def test_why_there_is_no_validation_data(corpus, documents, changes, said):
    paths = [corpus(f"d{number}", 1, documents=count) for number, count in enumerate(documents)]
    given = {"train_data_path": paths} if "train_data_path" in changes else {"data_path": paths, **changes}
    made = config(**given)
    built = build_datasets(made, StubTokenizer())
    assert built["valid"] is None and said in why_no_validation(made.data, built["train"])
