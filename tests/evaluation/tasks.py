"""Tasks of lm-evaluation-harness on this machine: choices (log-likelihoods), writing (texts), reading (whole texts)."""

import json
import pathlib

DOCUMENTS = {
    "choices": [
        {"question": "the cat sat on", "choices": ["the mat", "a song of the sea", "hat"], "answer": 0},
        {"question": "she gave him", "choices": ["a red ball", "all night"], "answer": 1},
        {"question": "the sun was over", "choices": ["the sea", "the roof"], "answer": 0},
        {"question": "a bird flew over the house and rain fell on the roof all night and the man at the door had a hat",
         "choices": ["and a book", "in the sea"], "answer": 0},
    ],
    "writing": [{"question": "the cat sat", "answer": " on the m"}, {"question": "rain fell on", "answer": "b"}],
    "reading": [{"text": "the cat sat on the mat"}, {"text": "they sang a song of the sea and " * 6}],
}  # fmt: skip
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}]\n",
    "writing": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    'generation_kwargs: {until: ["a"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n',
    "reading": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
    "metric_list: [{metric: word_perplexity}]\n",
}


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """A folder of YAML files and their documents."""
    folder.mkdir()
    for name, documents in DOCUMENTS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in documents))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + TASKS[name])
    return folder
