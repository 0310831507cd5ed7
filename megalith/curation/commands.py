"""The verbs of corpus work by name."""

from __future__ import annotations

from megalith.common.registry import Registry

COMMANDS = Registry(
    "step",
    {
        "wiki": "megalith.curation.wiki.command:Wiki",
        "warc": "megalith.curation.warc.command:Warc",
        "urls": "megalith.curation.urls:Urls",
        "clean": "megalith.curation.clean.command:Clean",
        "dedup": "megalith.curation.dedup.command:Dedup",
        "decontaminate": "megalith.curation.decontaminate.command:Decontaminate",
        "ids": "megalith.curation.ids:Ids",
        "shuffle": "megalith.curation.shuffle:Shuffle",
        "sample": "megalith.curation.sample:Sample",
        "stats": "megalith.curation.stats:Stats",
    },
)
SETTINGS = Registry("step", {name: f"megalith.curation.settings:{name.capitalize()}Settings" for name in COMMANDS})
HELP = {
    "wiki": "a MediaWiki dump, or WikiExtractor's output, to JSON lines",
    "warc": "web archives (WARC, WET) to JSON lines",
    "urls": "lists of URLs without those of no use",
    "clean": "correct texts, and drop documents by rules",
    "dedup": "drop repeated documents, paragraphs or URLs",
    "decontaminate": "take the texts of evaluation tasks out of a corpus",
    "ids": "number the documents",
    "shuffle": "a global random order, out of core",
    "sample": "a part of the documents, of each source alike",
    "stats": "documents, characters, tokens, languages, sources, lengths",
}
EXAMPLES = {
    "wiki": "enwiki-latest-pages-articles-multistream.xml.bz2 --output wiki.jsonl",
    "warc": "'crawl/*.warc.gz' --output pages.jsonl --dropped dropped.jsonl",
    "urls": "urls.txt --output good_urls.txt",
    "clean": "corpus.jsonl --output clean.jsonl --language en --dropped dropped.jsonl",
    "dedup": "clean.jsonl --output unique.jsonl",
    "decontaminate": "unique.jsonl --output train.jsonl --tasks lambada=lambada_test.jsonl",
    "ids": "corpus.jsonl --output numbered.jsonl --id-prefix wiki",
    "shuffle": "corpus.jsonl --output shuffled.jsonl --seed 1234",
    "sample": "corpus.jsonl --output sample.jsonl --rate 0.01",
    "stats": "corpus.jsonl --output stats.json",
}
