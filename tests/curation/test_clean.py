"""Every rule has a text that it drops (or changes) and a near one that it keeps; many do what each does in turn."""

import json
import pathlib
import random
import re

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.curation.clean import corrections
from megalith.curation.clean.rules import CORRECTIONS, GROUPS, TESTS, WITH_SETTINGS, Text, build_rule
from tests.toy import make_corpus

SAMPLE = pathlib.Path(__file__).parents[3] / "shared/data/dedup/cleaning_sample.jsonl"
WORDS = "It was the best of times and it was the worst of times that people have seen with their eyes"
PROSE = f"{WORDS}, said nobody in particular to anyone who would listen. "


def varied(count, seed=1):
    """So many different sentences of random words, with stop words among them."""
    draw = random.Random(seed)
    sentences = (
        [draw.choice(["the", "of", "and"]) if draw.random() < 0.2 else f"w{draw.randrange(9999)}" for _ in range(9)]
        for _ in range(count)
    )
    return " ".join(" ".join(words) + "." for words in sentences)


def words(count):
    return " ".join(f"word{i}" for i in range(count))


PAGE = f"<html><body><nav><a>Home</a></nav><article><p>{PROSE * 3}</p></article><script>x = 1</script></body></html>"
CHANGES = {  # rule -> (text, what it becomes), (a near text that stays)
    "html": ((PAGE, (PROSE * 3).strip()), "a < b and c > d"),
    "ftfy": (("It\xe2\x80\x99s d\xc3\xa9j\xc3\xa0 vu", "It's déjà vu"), "It's déjà vu"),
    "unicode": (("cafe\u0301", "café"), "ﬁne café"),
    "unicode_nfkc": (("ﬁne ①", "fine 1"), "fine 1 — café"),
    "punctuation": (("“A” — it’s…", '"A"  -  it\'s...'), '"A" - it\'s... é'),
    "newlines": (("a  \r\n\n\n\nb\n", "a\n\nb"), "a\n\nb\nc"),
    "general_cleaning": (("two  words\n in a line.\nNext", "two words in a line.\nNext"), "A line.\n\nNext one."),
    "emails": (("Mail a.b+c@mail.example.org now", "Mail <EMAIL> now"), "a @ b, user@localhost and @handle"),
    "ip_addresses": (
        ("from 192.168.10.254 and 2001:db8::1.", "from <IP_ADDRESS> and <IP_ADDRESS>."),
        "at 10:30:59, 1.2.3, 300.1.1.1 and std::vector",
    ),
    "c4_terminal_punctuation": (("A line.\nHome | About\nEnd!", "A line.\nEnd!"), 'A line.\n\n"End"'),
    "c4_short_lines": (
        ("This line has five words.\nThis one four words", "This line has five words."),
        "one two three four five",
    ),
    "c4_javascript_lines": (("Text.\nPlease enable JavaScript.", "Text."), "Text on Java and script."),
    "c4_policy_lines": (("Text.\nThis site uses cookies.", "Text."), "Grandmother used to bake cookies."),
    "c4_citations": (("Born in 1900.[12][citation needed]", "Born in 1900."), "An array[1234] of [words]."),
}
DROPS = {  # test -> (a text that it drops, a near one that stays)
    "c4_sentences": ("One. Two.", "One. Two. Three."),
    "c4_lorem_ipsum": ("See Lorem Ipsum here.", "See lorem here, ipsum there."),
    "c4_curly_bracket": ("if (x) { y }", "if (x) ( y )"),
    "gopher_word_count": (words(49), words(50)),
    "gopher_mean_word_length": ("a bc " * 20, "abc def " * 20),
    "gopher_hashes": ("# " * 6 + words(53), "# " * 5 + words(53)),
    "gopher_ellipses": ("... " * 6 + words(53), "… " * 5 + words(53)),
    "gopher_bullet_lines": ("- a\n" * 19 + "b", "- a\n" * 9 + "b"),
    "gopher_ellipsis_lines": ("a...\n" * 4 + "b\n" * 6, "a...\n" * 3 + "b\n" * 7),
    "gopher_alphabetic_words": ("12 " * 21 + "ab " * 79, "12 " * 20 + "ab " * 80),
    "gopher_stop_words": ("the the dog of".replace("of", "runs"), "the dog of runs"),
    "gopher_duplicate_lines": ("a\n" * 5 + "b\nc\nd\ne\nf\ng\nh\n", "a\n" * 4 + "b\nc\nd\ne\nf\ng\nh\n"),
    "gopher_duplicate_line_characters": ("same line\n" * 3 + "x" * 40, "same line\n" * 2 + "x" * 40),
    "gopher_duplicate_paragraphs": (
        "a\n\n" * 5 + "b\n\nc\n\nd\n\ne\n\nf\n\ng\n\nh",
        "a\n\n" * 4 + "b\n\nc\n\nd\n\ne\n\nf\n\ng\n\nh",
    ),
    "gopher_duplicate_paragraph_characters": ("same one\n\n" * 3 + "x" * 40, "same one\n\n" * 2 + "x" * 40),
    "gopher_top_ngrams": ("buy now " * 6 + words(12), "buy now " * 2 + words(12)),
    "gopher_duplicate_ngrams": ("a phrase of five words " * 2 + words(11), "a phrase of five words " * 2 + words(40)),
    "fineweb_line_punctuation": ("Home\n" * 22 + "End.\n" * 3, "Home\n" * 21 + "End.\n" * 3),
    "fineweb_duplicate_lines": ("same line\n" * 2 + "x" * 60, "same line\n" * 2 + "x" * 80),
    "fineweb_short_lines": ("short\n" * 7 + ("long " * 8 + "\n") * 3, "short\n" * 6 + ("long " * 8 + "\n") * 4),
    "javascript": ("Enable JavaScript. " + words(250), "Enable JavaScript. " + words(254)),
    "cookies": ("Accept cookies? " + words(250), "A recipe for cookies. " + words(250)),
}
NULL = {"tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 100}}  # a number is a token
SETTINGS = {  # rule with settings -> (settings, a text that it drops, a near one that stays)
    "min_characters": ({"min_characters": 10}, "123456789", "1234567890"),
    "max_characters": ({"max_characters": 10}, "12345678901", "1234567890"),
    "min_tokens": (NULL | {"min_tokens": 4}, "1 2 3", "1 2 3 4"),
    "max_tokens": (NULL | {"max_tokens": 4}, "1 2 3 4 5", "1 2 3 4"),
    "bad_words": ({"bad_words": "bad.txt"}, "A rude word.", "A crude words."),
    "language": (
        {"language": "en"},
        "Der Hund lief schnell durch den Wald und bellte laut.",
        "The dog ran quickly through the woods and barked.",
    ),
}


@pytest.fixture
def bad_words(tmp_path, monkeypatch):
    """The file of SETTINGS, in the working directory."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("bad.txt").write_text("Rude Word\nother\n")


def test_every_rule_has_its_two_texts():
    assert (set(CHANGES), set(DROPS), set(SETTINGS)) == (set(CORRECTIONS), set(TESTS), set(WITH_SETTINGS))


@pytest.mark.parametrize("rule", CORRECTIONS)
def test_corrections(rule):
    (before, after), same = CHANGES[rule]
    assert build_rule(rule).correct(before) == after
    assert build_rule(rule).correct(same) == same


@pytest.mark.parametrize("rule", TESTS)
def test_drops(rule):
    dropped, kept = DROPS[rule]
    test = build_rule(rule).test
    assert test(Text(dropped)) and not test(Text(kept)), (test(Text(dropped)), test(Text(kept)))


@pytest.mark.parametrize("rule", SETTINGS)
def test_rules_with_settings(rule, write, step, bad_words):
    settings, dropped, kept = SETTINGS[rule]
    records, report = step(
        "clean", write("a.jsonl", [{"text": dropped}, {"text": kept}]), {"rules": (rule,)} | settings
    )
    assert records == [{"text": kept}]
    (example,) = report["rules"][rule]["examples"]
    assert example["where"].endswith("a.jsonl:1") and example["text"] == dropped


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([PROSE, "Home\n", "\n\n\n", "It\xe2\x80\x99s ", "# # ", "javascript ", "a@b.example.org "]),
        st.text(max_size=30),
    ),
    min_size=1,
    max_size=12,
).map("".join)


TOGETHER = {  # settings of all rules at once
    "language": "en", "bad_words": "bad.txt", "min_characters": 20, "max_characters": 3000, "min_tokens": 5,
    "max_tokens": 900, "tokenizer": {"tokenizer_type": "BertWordPieceLowerCase", "vocab_file": "vocab.txt"},
}  # fmt: skip
COUNT_TOKENS = ("min_tokens", "max_tokens", "javascript", "cookies")


def english(seed):
    """Lines that no rule drops."""
    draw, common = (
        random.Random(seed),
        f"{WORDS} who would have thought that such a river runs through our old town".split(),
    )
    return "\n".join(" ".join(draw.choice(common) for _ in range(14)).capitalize() + "." for _ in range(9))


def corpus():
    """Texts that rules change or drop, alone and in a text that they would keep otherwise."""
    texts = [text for (before, after), same in CHANGES.values() for text in (before, after, same)]
    texts += [text for pair in DROPS.values() for text in pair]
    texts += [text for _, *pair in SETTINGS.values() for text in pair]
    texts += [f"{english(i)}\n{text}" for i, text in enumerate(texts)] + [english(0) * 3]
    return [{"text": text, "id": i} for i, text in enumerate(texts)]


def test_all_rules_are_each_in_turn(write, step, bad_words, tmp_path):
    """The original applies the first task alone."""
    make_corpus(tmp_path)
    rules = [*CORRECTIONS, *reversed([*TESTS, *WITH_SETTINGS])]  # the first tests would drop nearly all
    at_once, report = step("clean", write("a.jsonl", corpus()), {"rules": tuple(rules)} | TOGETHER, "once.jsonl")
    path, dropped = write("b.jsonl", corpus()), {}
    for rule in rules:
        names = {rule} | ({"tokenizer"} if rule in COUNT_TOKENS else set())
        alone = {name: value for name, value in TOGETHER.items() if name in names}
        in_turn, one = step("clean", path, {"rules": (rule,)} | alone, f"{rule}.jsonl")
        path = one["output"]
        dropped |= {name: found["documents"] for name, found in one["rules"].items()}
    assert at_once == in_turn and len(at_once) > 10 and len(dropped) > 15
    assert {name: found["documents"] for name, found in report["rules"].items()} == dropped


PLAIN = st.text(st.characters(min_codepoint=9, max_codepoint=126) | st.sampled_from("–—‘’“”éâ€"), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TEXTS, PLAIN))
@example("a\r\nb\xe9\r\n")
def test_our_short_cut_is_ftfy(text):
    assert corrections.fix_encoding(text) == ftfy.fix_text(text)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_no_rule_fails(text):
    for rule in map(build_rule, (*CORRECTIONS, *TESTS)):
        assert isinstance(rule.correct(text) if rule.correct else rule.test(Text(text)), str)


def test_every_group_and_rule_is_listed_in_the_documentation():
    page = (pathlib.Path(__file__).parents[2] / "docs/corpus.md").read_text()
    table = page[page.index("| rule | what it does | source |") :].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert sorted(name for name, _, _ in listed) == sorted([*CORRECTIONS, *TESTS, *WITH_SETTINGS])
    assert all(f"`{group}`" in page for group in GROUPS)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"rules": ("gopfer",)}, "unknown rule gopfer: did you mean gopher"),
        ({"rules": ("language",)}, "--language must be given for the rule language"),
        ({"rules": ("ftfy",), "language": "en"}, "--language is used by the rule language alone"),
        ({"language": "english"}, "--language must be one of"),
        ({"min_characters": -1}, "--min-characters must be 0 or more"),
        ({"min_charactres": 1}, "did you mean min_characters"),
    ],
)
def test_settings_that_cannot_work(settings_, message, write, step):
    with pytest.raises(ConfigError, match=message):
        step("clean", write("a.jsonl", [{"text": "a"}]), settings_)


def test_dropped_documents_and_their_rules(write, step, tmp_path):
    source = write("a.jsonl", [{"text": "short", "id": 7}, {"text": PROSE * 9, "id": 8}])
    records, _ = step("clean", source, {"min_characters": 100}, dropped=str(tmp_path / "dropped.jsonl"))
    assert [record["id"] for record in records] == [8]
    assert json.loads((tmp_path / "dropped.jsonl").read_text()) == {
        "dropped_by": "min_characters", "found": "5 characters", "text": "short", "id": 7,
    }  # fmt: skip


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs the real data in ../shared")
def test_planted_faults(step):
    """The sample says what a cleaner should do with each record; copies are the deduplication's."""
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    kept, _ = step("clean", str(SAMPLE), {"language": "en"})
    kept_ids = {record["id"]: record for record in kept}
    for record in records:
        what = record["expect"]
        if what.startswith("drop_duplicate_of"):
            continue
        assert (record["id"] in kept_ids) == (not what.startswith("drop")), (record["id"], what)
        if what == "fix_mojibake":
            assert "â€" not in kept_ids[record["id"]]["text"]
        if what == "keep_squeeze_newlines":
            assert "\n\n\n" not in kept_ids[record["id"]]["text"]
