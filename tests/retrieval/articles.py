"""The articles of ../shared, and questions on them that were written before a model was asked."""

import json
import pathlib
import re
import shutil

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
QUESTIONS = {
    "who invented the constant k filter": "George Campbell",
    "who wrote the film american beauty": "Alan Ball",
    "who developed the dvorak technique": "Vernon Dvorak",
    "which band recorded the song kiss you": "One Direction",
    "which embassy was evacuated in operation eastern exit": "Mogadishu",
    "in which dynasty did the poet du fu live": "Tang",
    "for which football club did ben amos play": "Manchester United",
    "in which city is temple beth israel": "Eugene",
    "which company built the light tank mk vii": "Vickers",
    "which team does brad stevens coach": "Boston Celtics",
    "which sport does hannah dodd play": "wheelchair basketball",
    "in which city were the summer olympics to which chad sent athletes": "Beijing",
    "of what were the colossal heads sculpted": "basalt",
    "which magazine had the view of the world from 9th avenue on its cover": "New Yorker",
    "which aircraft did no. 20 squadron fly": "Catalinas",
    "which film company produced the heart of ezra greer": "Thanhouser",
}


def write_real_files(folder: pathlib.Path) -> None:
    """corpus.jsonl, the 60 articles of WikiText-2's test part without its marks; vocab.txt, BERT's; questions.csv."""
    lines = (SHARED / "loose_json/wikitext2_test_articles.jsonl").read_text().splitlines()
    articles = [{name: json.loads(line)[name] for name in ("title", "text")} for line in lines]
    for each in articles:  # "<unk>" is in the place of rare words, "@-@" is a hyphen
        for name, text in each.items():
            each[name] = " ".join(re.sub(r" @(.)@ ", r"\1", text.replace("<unk>", "")).split()) or "untitled"
    (folder / "corpus.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in articles))
    shutil.copy(SHARED / "bert/bert-base-uncased-vocab.txt", folder / "vocab.txt")
    (folder / "questions.csv").write_text("".join(f"{each}\t{[answer]}\n" for each, answer in QUESTIONS.items()))
