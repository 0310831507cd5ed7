"""What follows from a task where recipe, file or flags say otherwise: that of the task, and a line that names both."""

import pytest

from megalith.config.checks.finetune import finetune_problems
from megalith.config.finetuning import conclusions
from megalith.config.flags.flags import read
from megalith.config.flags.loading import resolve
from megalith.config.run import RunConfig

OF_RACE = {
    "model_type": "bert_multiple_choice", "dataset": "classification", "loss": "classification", "name": "race",
    "num_classes": RunConfig().model.num_classes,
}  # fmt: skip
OF_BERT = {"model_type": "bert", "dataset": "bert", "loss": "bert", "name": "bert"}
OF_RTE = {"model_type": "bert_classification", "dataset": "classification", "loss": "classification"}
CASES = [  # what recipe, file and flags set; what the task makes of it; words of the lines
    ({"task": "rte", **OF_BERT}, OF_RTE, ["the model is bert_classification, a bert with the head of the task"]),
    (
        {"task": "rte", **OF_RACE}, OF_RTE,
        ["--model-type is bert_classification, as the task has it, and not bert_multiple_choice"],
    ),
    (
        {"task": "stsb", **OF_RTE, "num_classes": 1}, {"loss": "regression"},
        ["--loss is regression, as the task has it, and not classification"],
    ),
    (
        {"task": "completion", "model_type": "gpt", "dataset": "chat", "loss": "lm"}, {"dataset": "completion"},
        ["--dataset is completion, as the task has it, and not chat"],
    ),
    ({"task": "chat", "model_type": "gpt", "dataset": "gpt", "loss": "lm"}, {"dataset": "chat"}, []),
    (
        {"task": "chat", "model_type": "t5", "dataset": "gpt"}, {"dataset": "chat"},
        ["--dataset is chat, as the task has it, and not gpt"],
    ),
    ({"task": "chat", "dataset": "mine:Chats"}, {}, []),
    ({"task": "rte", "num_classes": 3}, {}, []),  # an error of the data, which names both
]  # fmt: skip


@pytest.mark.parametrize(("values", "expected", "lines"), CASES)
def test_a_task_in_a_config_of_another(values, expected, lines):
    notices = list[str]()
    merged = values | conclusions(values, notices)
    assert {name: merged[name] for name in expected} == expected
    assert {name for name in values if merged[name] != values[name]} <= {*expected, "name", "num_classes"}
    assert notices == lines


def test_the_yaml_of_a_run_of_another_task(tmp_path):
    """As `megalith finetune completion --config RUN_OF_CHAT/config.yaml`."""
    (tmp_path / "config.yaml").write_text(
        "model: {model_type: gpt, num_layers: 2, hidden_size: 32, num_attention_heads: 4}\n"
        "data: {dataset: chat, loss: lm, seq_length: 64, tokenizer_model: x}\n"
        "finetuning: {task: chat, train_data: [x.jsonl], epochs: 1.0}\nbatch: {micro_batch_size: 1}\n"
        "optimizer: {lr: 1.0e-3}\n"
    )
    reading = read(["--config", str(tmp_path / "config.yaml"), "--task", "completion"])
    config, notices = resolve(reading)
    assert (config.data.dataset, config.finetuning.task) == ("completion", "completion")
    assert "--dataset is completion, as the task has it, and not chat" in notices


def test_a_decoder_of_answers_alone_trains_no_prompts():
    config = RunConfig().replace(model_type="t5", dataset="chat", assistant_only_loss=False)
    texts = [each.text for each in finetune_problems(config)]
    wanted = "--assistant-only-loss must be true for a t5, whose decoder reads nothing but answers; found False. Leave"
    assert any(text.startswith(wanted) for text in texts)
    others = finetune_problems(config.replace(model_type="gpt"))
    assert not any("--assistant-only-loss" in each.text for each in others)
