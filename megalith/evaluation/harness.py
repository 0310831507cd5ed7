"""EleutherAI's lm-evaluation-harness on a checkpoint as it is, in any layout: its model class, and how it is run.

    megalith evaluate --harness hellaswag,piqa runs/first
    python -m megalith.evaluation run --model megalith --model_args path=runs/first --tasks hellaswag

The second is the harness's own command line, with all of its flags, to which the model `megalith` is added. (lm-eval
0.4.13 looks for no plug-ins, so that `lm_eval` itself cannot know of it.)

Every process of a model runs the whole harness on the same requests, and their scores and texts are shared out inside
(Scorer, complete): to the harness there is one process.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.evaluation.evaluate import progress, sequence_length
from megalith.evaluation.result import Metric, Result
from megalith.evaluation.scoring import Sample, Scorer
from megalith.generation.generate import complete
from megalith.generation.load import load
from megalith.generation.model import TextModel
from megalith.generation.params import GenerationParams

NEW_TOKENS = 256  # of an answer whose task does not say; the harness's own default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first given counts
KNOWN_OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", *LENGTH_NAMES}


@register_model("megalith")
class HarnessModel(TemplateLM):
    """A model of megalith as the harness calls it."""

    def __init__(
        self, path: str | None = None, *, model: TextModel | None = None, batch_size: int | str = 8,
        max_length: int | None = None, device: str | None = None, show: bool = True, max_batch_size: Any = None,
        **options: Any,
    ):  # fmt: skip
        """path, device, options: see `megalith.load` (tensor_model_parallel_size=2, dtype=bfloat16, ...); or a `model`
        that is loaded already. batch_size: texts that a process reads at a time; also the texts written at one time.
        max_length: the most tokens of a text (default: all that the model can read). show: progress bars on a terminal.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(problem("batch_size", batch_size, "must be a whole number of at least 1", "Try 8"))
        if model is None:
            if path is None:
                raise ConfigError(problem("path", Words("nothing"), "must name the model", "Add path=runs/first"))
            model = load(path, device=device or "auto", **options)
        if model.tokenizer is None:
            raise ConfigError(problem("The model", Words("no tokenizer"), "must have one", "Name its files"))
        self.model, self.batch_size, self.show = model, int(batch_size), show
        self.scorer = Scorer(model, self.batch_size)
        self.max_length = sequence_length(max_length, self.scorer.limit)
        self.notes = collections.Counter[str]()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """Of --model_args and the harness's other flags; where both say a thing (device), --model_args counts."""
        others = {name: value for name, value in (additional_config or {}).items() if name not in arg_dict}
        return super().create_from_arg_obj(arg_dict, others)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.model.tokenizer.require("eod")

    @property
    def prefix_token_id(self) -> int:
        """What a text without anything before it is predicted from: BOS, where the tokenizer has one."""
        bos = self.model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Tokens of a text, with what the tokenizer puts before every text (Llama's BOS) unless that is not wanted."""
        tokenizer = self.model.tokenizer
        ids = list(map(int, tokenizer.encode(string)))
        return ids if add_special_tokens in (None, True) else ids[len(tokenizer.encode("")) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether each token is the likeliest) of the second tokens after the first."""
        answers = [(0.0, True)] * len(requests)  # of an empty continuation
        numbers = [number for number, (_, _, continuation) in enumerate(requests) if continuation]
        samples = [self.sample(*requests[number][1:]) for number in numbers]
        with progress("log-likelihoods", len(samples), self.show and not disable_tqdm) as advance:
            scores = self.scorer(samples, advance)
        for number, sample, (loss, hits) in zip(numbers, samples, scores.tolist()):
            answers[number] = (-loss, hits == sample.scored)
        for (texts, *_), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def sample(self, context: list[int], continuation: list[int]) -> Sample:
        """What is too long is cut off at the left, as by the harness's model of transformers."""
        ids = [*context, *continuation][-self.max_length - 1 :]
        self.notes["texts are longer than the model's context and were cut off at the left"] += len(ids) < len(
            context
        ) + len(continuation)
        return Sample(ids, min(len(continuation), len(ids) - 1))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap (the harness's definition)."""
        samples, owners = list[Sample](), list[int]()
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [Sample([*before, *after], len(after)) for before, after in map(make_disjoint_window, pairs)]
            samples += found
            owners += [number] * len(found)
        with progress("log-likelihoods of texts", len(samples), self.show and not disable_tqdm) as advance:
            scores = self.scorer(samples, advance)
        totals = [0.0] * len(requests)
        for number, loss in zip(owners, scores[:, 0].tolist()):
            totals[number] -= loss
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the stop texts, by continuous batching: one that ends makes room for the next."""
        prompts, params = list[list[int]](), list[GenerationParams]()
        for request in requests:
            context, given = request.args
            params.append(generation_params(given))
            if (room := self.max_length - params[-1].max_new_tokens) < 1:
                rule = f"must be less than {self.max_length}, the tokens that the model can read"
                cure = "Lower it in the task, or by --gen_kwargs of the harness"
                raise ConfigError(problem("max_gen_toks", params[-1].max_new_tokens, rule, cure))
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.notes["prompts are longer than the model's context and were cut off at the left"] += len(ids) > room
            prompts.append(ids[-room:])
        if not prompts:
            return []
        answers = complete(self.model, prompts, params=params, batch_size=self.batch_size)
        texts = [answer.continuation or "" for answer in answers]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def generation_params(given: Mapping[str, Any]) -> GenerationParams:
    """The harness's generation_kwargs, which are greedy unless they say otherwise."""
    if unknown := sorted(set(given) - KNOWN_OPTIONS):
        rule = f"must be among {', '.join(sorted(KNOWN_OPTIONS))}"
        raise ConfigError(problem("generation_kwargs", Words(", ".join(unknown)), rule, "Leave it out"))
    lengths = [given[name] for name in LENGTH_NAMES if given.get(name) is not None]
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") is True and "temperature" not in given:
        temperature = 1.0
    options = {name: given[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if given.get(name)}
    return GenerationParams(
        max_new_tokens=int(lengths[0]) if lengths else NEW_TOKENS,
        temperature=0.0 if given.get("do_sample") is False else temperature,
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
        seed=0, echo=False, **options,
    )  # fmt: skip


def run_tasks(
    model: TextModel, tasks: Sequence[str], *, include_path: str | None = None, num_fewshot: int | None = None,
    limit: float | None = None, batch_size: int = 8, max_length: int | None = None, show: bool = True,
) -> dict[str, Result]:  # fmt: skip
    """The Result of each task. Every process of the model calls it, and gets all.

    tasks: names of the harness's tasks and groups, or of those in the folder include_path, or YAML files. num_fewshot,
    limit: examples before each question; questions of each task, or a share of them below 1.
    """
    manager = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # the harness's own are thousands of files to read
        manager = TaskManager(include_path=include_path)
    known = manager.all_tasks
    if unknown := [name for name in tasks if name not in known and not name.endswith((".yaml", ".yml"))]:
        cure = "Correct the name (`lm_eval ls tasks` lists them), or name the folder of yours by --include-path"
        raise ConfigError(problem("--harness", unknown[0], "must name tasks of lm-evaluation-harness", cure))
    lm = HarnessModel(model=model, batch_size=batch_size, max_length=max_length, show=show)
    found = simple_evaluate(lm, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    if found is None:  # on processes that are not the first of their machine
        return {}
    notes = [f"{count} {what}" for what, count in lm.notes.items() if count]
    shots, versions = found["n-shot"], found["versions"]
    return {
        name: Result(
            {
                metric: Metric(value, f"lm-evaluation-harness {lm_eval.__version__}, {name} version "
                               f"{versions.get(name)}, {shots.get(name, 0)} examples before each question")
                for metric, value in metrics.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            },
            examples=found["samples"].get(name, []), notes=notes,
        )
        for name, metrics in found["results"].items()
    }  # fmt: skip
