"""What `megalith detoxify` is told, each field with its help: the verb has a flag for each. No torch."""

from __future__ import annotations

import dataclasses

from megalith.common.errors import ConfigError, problem
from megalith.common.registry import Registry
from megalith.config.flags.text import Words, check_minimum, choose, fail, flag
from megalith.config.options import option

STEPS = ("generate", "score", "filter", "preprocess", "finetune", "continue", "measure", "report")
SCORERS = Registry(  # a Scorer each (workflows/detoxify/scorers.py)
    "scorer",
    {
        "words": "megalith.workflows.detoxify.scorers:WordList",
        "finetuned": "megalith.workflows.detoxify.classifiers:FinetunedClassifier",
        "huggingface": "megalith.workflows.detoxify.classifiers:HuggingFaceClassifier",
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetoxifyOptions:
    """The model, the texts, the scorer, and how each step is done. Raises ConfigError for what cannot work."""

    load: str = option("", "the model: a run's folder, a checkpoint, or weights of Hugging Face or Megatron")
    output: str = option("", "the folder of all that is made")
    prompt_file: str = option("", "prompts to continue: lines of text, or JSON lines as of RealToxicityPrompts")
    valid_data: tuple[str, ...] = option((), "held texts, whose perplexity shows what the training costs")
    samples: tuple[str, ...] = option((), "texts that it has written already (JSON lines), instead of step generate")
    scorer: str = option("words", "words, finetuned, huggingface, or module:name of your own")
    scorer_path: str | None = option(None, "the scorer's file of words, or the folder of its model")
    scorer_label: str | None = option(None, "the class of a classifier that is toxic (default: toxic, toxicity)")
    num_samples: int = option(10_000, "texts that are written without a prompt", minimum=1)
    samples_per_file: int = option(1000, "texts of a file, which is what a killed step repeats at most", minimum=1)
    max_new_tokens: int | None = option(
        None, "most tokens of a text (default: 1000, or all that the model can read)", minimum=1
    )
    top_p: float = option(0.9, "the share of probability that tokens are drawn from")
    temperature: float = option(1.0, "of the draws")
    seed: int = option(1, "of the first file of texts; each file has the next one", minimum=0)
    keep_fraction: float = option(0.5, "of the texts that have a score, the share that is kept, the cleanest")
    continuations: int = option(25, "continuations of each prompt", minimum=1)
    continuation_tokens: int = option(20, "tokens of a continuation", minimum=1)
    threshold: float = option(0.5, "a text with this score or more counts as toxic")
    seq_length: int | None = option(
        None, "tokens read at a time, in training and for the perplexity (default: all it can)", minimum=1
    )
    micro_batch_size: int = option(4, "sequences that a process trains on at a time", minimum=1)
    global_batch_size: int = option(512, "sequences of a training step", minimum=1)
    train_iters: int | None = option(None, "training steps (default: one pass over what is kept)", minimum=1)
    lr: float = option(2e-5, "learning rate, which is constant")
    train_flags: str = option(
        "", 'more flags of `megalith pretrain`, which count over those above: --train-flags="--bf16 --lora-rank 8"'
    )
    batch_size: int = option(32, "texts that are written at one time", minimum=1)
    dtype: str = option("float32", "in which texts are written and measured: float32, bfloat16 or float16")
    device: str = option("auto", "auto, cpu, cuda or xpu")

    def __post_init__(self):
        for each in dataclasses.fields(self):
            check_minimum(each.name, getattr(self, each.name), each.metadata["minimum"])
        for name in ("keep_fraction", "threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                rule = "must be above 0, and at most 1"
                raise ConfigError(problem(flag(name), getattr(self, name), rule, f"Write {flag(name)} 0.5"))
        if ":" not in self.scorer:
            choose("scorer", self.scorer, SCORERS)

    def check_required(self) -> None:
        """Raise ConfigError that lists what is not given and has no default."""
        needed = {"load": "the model", "output": "a folder", "prompt_file": "prompts", "valid_data": "held texts"}
        missing = {name: what for name, what in needed.items() if not getattr(self, name)}
        fail(
            problem(flag(name), Words("nothing"), f"must name {what}", f"Add {flag(name)} PATH")
            for name, what in missing.items()
        )
