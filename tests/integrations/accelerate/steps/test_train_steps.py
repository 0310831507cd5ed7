"""Train steps of the user's own: losses and gradients are those of the same function of transformers' logits."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, TrainingError
from megalith.integrations.accelerate.steps.arguments import StepArguments
from megalith.integrations.accelerate.steps.megatron_models import documents_of, padding_of, visible_in
from megalith.integrations.accelerate.steps.providers import provided
from megalith.integrations.accelerate.steps.run import call, split_rows, step_of
from megalith.integrations.accelerate.steps.train_steps import (
    AbstractTrainStep,
    BertTrainStep,
    GPTTrainStep,
    T5TrainStep,
    build_train_step,
    call_in_either_form,
)
from megalith.models.gpt import GPT
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import accelerating, toy_model
from tests.integrations.accelerate.steps.stepping import (
    BATCH,
    LAYOUTS,
    LENGTH,
    Weighted,
    global_batch,
    local_batch,
    reference,
    session_of,
    stepped,
)

OWN = {"gpt2": GPTTrainStep, "llama": GPTTrainStep, "megatron-bert": BertTrainStep, "t5": T5TrainStep}


class PerToken(GPTTrainStep):
    """Megatron core's form: the sum of the losses, the number of tokens, a sum and a count to report."""

    def get_loss_func(self, accelerator):
        def loss_func(loss_mask, output_tensor):
            total, tokens = (output_tensor * loss_mask).sum(), loss_mask.sum()
            return total, tokens, {"lm loss": torch.stack((total, tokens))}

        return loss_func


def check(found: list[dict], expected: tuple[float, float], factor: float = 1.0) -> None:
    loss, norm = expected
    for each in found:
        assert each["loss"] == pytest.approx(loss, rel=1e-5)
        assert each["evaluated"] == pytest.approx(loss, rel=1e-5)
        assert each["norm"] == pytest.approx(norm * factor, rel=1e-4)


def run(layout: str, kind: str, head: str | None, fields: dict[str, Any], factor: float = 1.0) -> list[dict]:
    world, parallel = LAYOUTS[layout]
    how = kind, head, parallel | fields, factor
    return [stepped(*how)] if world == 1 else run_ranks(stepped, world, *how)


@pytest.mark.parametrize(
    ("kind", "head"), [("gpt2", None), ("llama", None), ("megatron-bert", None), ("megatron-bert", "classification"),
                       ("t5", None)]
)  # fmt: skip
def test_the_default_steps_have_transformers_loss(kind: str, head: str | None) -> None:
    """With one micro-batch, whose mean over tokens is that of the call."""
    found = run("one", kind, head, {"custom_train_step_class": OWN[kind]})
    check(found, reference(kind, head, "own"))


SOME = [("one", 2), ("pp2", 2)]
MORE = [(layout, number) for layout in LAYOUTS for number in (1, 2, 4) if (layout, number) not in SOME]
CASES = [pytest.param(*each, marks=pytest.mark.slow if each in MORE else ()) for each in (*SOME, *MORE)]


@pytest.mark.parametrize(("layout", "number"), CASES)
def test_a_loss_of_the_users_own(layout: str, number: int) -> None:
    """The guide's: a mean over samples, so that micro-batches do not matter. Its gradient is scaled by the script."""
    step = {"custom_train_step_class": Weighted, "custom_train_step_kwargs": {"token": 20}, "num_micro_batches": number}
    found = run(layout, "gpt2", None, step, 0.5)
    expected = reference("gpt2", None, "weighted")
    check(found, expected, 0.5)
    for each in found:
        assert each["losses"] == {"lm loss": pytest.approx(expected[0], rel=1e-5), "two": 2.0}


@pytest.mark.parametrize(("layout", "number"), CASES)
def test_a_mean_over_the_tokens_of_the_call(layout: str, number: int) -> None:
    found = run(layout, "gpt2", None, {"custom_train_step_class": PerToken, "num_micro_batches": number})
    expected = reference("gpt2", None, "tokens")
    check(found, expected)
    assert all(each["losses"] == {"lm loss": pytest.approx(expected[0], rel=1e-5)} for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2 pp2", "dp2 pp2"])
@pytest.mark.parametrize(("kind", "head"), [("megatron-bert", None), ("megatron-bert", "classification"), ("t5", None)])
def test_default_steps_of_other_models_in_layouts(kind: str, head: str | None, layout: str) -> None:
    """As one process with the same micro-batches: a mean over micro-batches of means over their tokens."""
    fields = {"custom_train_step_class": OWN[kind], "num_micro_batches": 2 if "dp" in layout else 4}
    (expected,) = run("one", kind, head, fields | {"num_micro_batches": 4})
    check(run(layout, kind, head, fields), (expected["loss"], expected["norm"]))


@pytest.mark.parametrize(
    "layout", ["one", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pp2", "tp2 pp2"))]
)
def test_logits_are_on_every_process(layout: str) -> None:
    fields = {"custom_train_step_class": GPTTrainStep, "return_logits": True, "num_micro_batches": 2}
    found = run(layout, "gpt2", None, fields)
    assert all(each["logits"] == [BATCH, LENGTH, 96] for each in found)
    plain = run("one", "gpt2", None, {"custom_train_step_class": GPTTrainStep, "num_micro_batches": 2})
    check(found, (plain[0]["loss"], plain[0]["norm"]))


def half_sized(loss_mask, output_tensor):
    loss = (output_tensor * loss_mask).sum() / loss_mask.sum() / 2
    return loss, {"half": loss}


def test_a_loss_function_alone_is_taken_by_the_models_own_step() -> None:
    (found,) = run("one", "gpt2", None, {"custom_loss_function": half_sized})
    loss, norm = reference("gpt2", None, "own")
    check([found], (loss / 2, norm / 2))
    assert found["losses"] == {"half": pytest.approx(loss / 2)}


def batch_without_mask(data_iterator):
    ids = next(data_iterator)["input_ids"]
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    return ids[:, :-1], ids[:, 1:], torch.ones(ids.shape[0], ids.shape[1] - 1), None, positions


def test_a_function_for_batches_alone() -> None:
    (found,) = run("one", "gpt2", None, {"custom_get_batch_function": batch_without_mask})
    model, batch = toy_model("gpt2"), global_batch("gpt2")
    expected = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_masks_of_megatron_mean_what_a_tokenizers_mean() -> None:
    """A T5 step that makes Megatron's masks itself, as those of Accelerate did."""

    class Masks(T5TrainStep):
        def get_forward_step_func(self):
            def forward_step(data_iterator, model):
                data = next(data_iterator)
                tokens, decoder, loss_mask, labels, *_ = self.get_batch(iter([data]))
                masks = (
                    self.attn_mask_postprocess(data["attention_mask"]),
                    self.get_decoder_mask(decoder.shape[1], decoder.device),
                    self.get_enc_dec_mask(data["attention_mask"], decoder.shape[1], decoder.device),
                )
                output_tensor = model(tokens, decoder, *masks, tokentype_ids=None, lm_labels=labels)
                return output_tensor, partial(self.loss_func, loss_mask)

            return forward_step

    check(run("one", "t5", None, {"custom_train_step_class": Masks}), reference("t5", None, "own"))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_documents_are_read_from_a_causal_mask(lengths: list[int], rows: int) -> None:
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(rows, -1)
    hidden = ~visible_in(documents)[:, None]
    found = documents_of(hidden, "attention_mask")
    assert found is None if len(lengths) == 1 else torch.equal(visible_in(found), visible_in(documents))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padding_is_read_from_an_encoders_mask(lengths: list[int]) -> None:
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    for hidden in (T5TrainStep.attn_mask_postprocess(mask), T5TrainStep.get_enc_dec_mask(mask, 3, mask.device)):
        assert torch.equal(padding_of(hidden, "mask"), mask)


def test_other_masks_are_refused() -> None:
    window = torch.ones(1, 5, 5, dtype=torch.bool).tril(-2) | torch.ones(1, 5, 5, dtype=torch.bool).triu(1)
    with pytest.raises(TrainingError, match="must be causal within documents"):
        documents_of(window, "attention_mask")
    with pytest.raises(TrainingError, match="must hide padding alone"):
        padding_of(window, "enc_mask")
    with pytest.raises(TrainingError, match="must be \\[b, s\\], 1 for tokens"):
        documents_of(window.float(), "attention_mask")


# A step that asks something of the output of a pipeline that only the last stage has, or later.
def uses_the_output(self, data_iterator, model):
    tokens, labels, loss_mask, mask, positions = self.get_batch(data_iterator)
    return model(tokens, positions, mask, labels=labels) * 2, partial(self.loss_func, loss_mask)


def calls_torch(self, data_iterator, model):
    tokens, labels, loss_mask, mask, positions = self.get_batch(data_iterator)
    return torch.log(model(tokens, positions, mask, labels=labels)), partial(self.loss_func, loss_mask)


def unpacks(self, data_iterator, model):
    tokens, labels, loss_mask, mask, positions = self.get_batch(data_iterator)
    losses, _ = model(tokens, positions, mask, labels=labels)
    return losses, partial(self.loss_func, loss_mask)


def calls_twice(self, data_iterator, model):
    tokens, labels, loss_mask, mask, positions = self.get_batch(data_iterator)
    first, _ = (model(tokens, positions, mask, labels=labels) for _ in range(2))
    return first, partial(self.loss_func, loss_mask)


def returns_another(self, data_iterator, model):
    tokens, labels, loss_mask, mask, positions = self.get_batch(data_iterator)
    model(tokens, positions, mask, labels=labels)
    return loss_mask, partial(self.loss_func, loss_mask)


FORWARD_STEPS = {each.__name__: each for each in (uses_the_output, calls_torch, unpacks, calls_twice, returns_another)}


def refused(name: str) -> str:
    """What a pipeline says to a forward step, on one rank."""
    kind = type(name, (GPTTrainStep,), {
        "get_forward_step_func": lambda self: partial(FORWARD_STEPS[name], self),
    })  # fmt: skip
    with accelerating():
        session = session_of("gpt2", pp_degree=2, num_micro_batches=2, custom_train_step_class=kind)
        batch, samples = local_batch(session, global_batch("gpt2"))
        with pytest.raises(TrainingError) as found:
            call(session, step_of(session), batch, samples, training=True)
        return str(found.value)


def refusals() -> dict[str, str]:
    return {name: refused(name) for name in FORWARD_STEPS}


def test_a_pipeline_refuses_what_it_cannot_run() -> None:
    for texts in run_ranks(refusals, 2):
        for name in ("uses_the_output", "calls_torch", "unpacks"):
            assert "must return the model's output as it is with a pipeline" in texts[name]
            assert "Compute in the function that get_loss_func returns" in texts[name]
        assert "must call the model once with a pipeline" in texts["calls_twice"]
        assert "must return what the model returned" in texts["returns_another"]


WRONG: dict[str, Any] = {
    "a number": (lambda mask, output: output.sum(), "The loss function must return (loss, {name: value})"),
    "losses of tokens": (lambda mask, output: (output, {}), "found (a tensor [8, 16], dict)"),
    "without gradient": (lambda mask, output: (mask.sum(), {}), "must depend on the output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_loss_function_must_return(name: str) -> None:
    function, text = WRONG[name]
    with pytest.raises(TrainingError) as found:
        run("one", "gpt2", None, {"custom_loss_function": function})
    assert text in str(found.value)


def test_methods_of_either_form_of_accelerate() -> None:
    def old(megatron_dataset_flag):
        return "old", megatron_dataset_flag

    def new(accelerator, megatron_dataset_flag):
        return accelerator, megatron_dataset_flag

    def neither():
        return "neither"

    assert call_in_either_form(old, "accelerator", True) == ("old", True)
    assert call_in_either_form(new, "accelerator", True) == ("accelerator", True)
    assert call_in_either_form(neither, "accelerator") == "neither"


def arguments(**changes: Any) -> StepArguments:
    known = dict.fromkeys(("custom_train_step_class", "custom_train_step_kwargs", "custom_loss_function"))
    known |= {"custom_get_batch_function": None, "context_parallel_size": 1, "megatron_dataset_flag": False}
    known |= {"model_return_dict": True, "eos_token_id": 0, "reset_position_ids": False, "eod_mask_loss": False}
    return StepArguments(**known | {"reset_attention_mask": False, "return_logits": False} | changes)


def test_steps_are_made_in_both_forms() -> None:
    class New(GPTTrainStep):
        def __init__(self, args, scale=1):
            super().__init__("the accelerator", args)
            self.scale = scale

        def get_loss_func(self, accelerator):
            return lambda *_: accelerator

    args = arguments(custom_train_step_class=New, custom_train_step_kwargs={"scale": 3})
    step = build_train_step("gpt", args)
    assert (step.scale, step.loss_func(), step.name) == (3, "the accelerator", "New")
    old = build_train_step("gpt", arguments(custom_train_step_class=GPTTrainStep))
    assert (old.eod_token, old.model_output_class.__name__) == (0, "CausalLMOutputWithCrossAttentions")
    assert GPTTrainStep(arguments(model_return_dict=False)).model_output_class is None


def test_a_step_from_the_abstract_class_alone() -> None:
    class Bare(AbstractTrainStep):
        def __init__(self, args):
            super().__init__("bare")

        def get_forward_step_func(self):
            return lambda data_iterator, model: "forward"

    step = build_train_step("gpt", arguments(custom_train_step_class=Bare))
    assert step.forward_step(None, None) == "forward"
    assert step.model_output_class.__name__ == "CausalLMOutputWithCrossAttentions"


def test_what_cannot_be_a_step() -> None:
    with pytest.raises(ConfigError, match="custom_train_step_class must be a class"):
        build_train_step("gpt", arguments(custom_train_step_class="GPTTrainStep"))
    with pytest.raises(ConfigError, match="must have forward_step"):
        build_train_step("gpt", arguments(custom_train_step_class=lambda args: object()))
    with pytest.raises(ConfigError, match="context_parallel_size must be 1"):
        build_train_step("gpt", arguments(custom_train_step_class=GPTTrainStep, context_parallel_size=2))


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no argument eos_token; did you mean eos_token_id"):
        arguments().eos_token  # noqa: B018


def test_step_arguments_are_those_that_scripts_read() -> None:
    with accelerating():
        session = session_of("megatron-bert", custom_train_step_class=BertTrainStep)
        args = step_of(session).args
    assert (args.num_layers, args.hidden_size, args.model_type_name) == (4, 32, "bert")
    assert (args.pretraining_flag, args.num_labels, args.bert_binary_head) == (True, 2, True)
    assert not args.eod_mask_loss


class Plugin:
    """As much of a plugin as `split_rows` and `provided` read."""

    def __init__(self, num_micro_batches=1, provider=None, prepare=None):
        self.num_micro_batches = num_micro_batches
        self.custom_model_provider_function, self.custom_prepare_model_function = provider, prepare


@given(st.integers(1, 30), st.integers(1, 6))
def test_rows_are_split_evenly(rows: int, number: int) -> None:
    from megalith.config.run import RunConfig

    session: Any = type("Session", (), {"plugin": Plugin(number), "config": RunConfig()})()
    batch = {"input_ids": torch.arange(rows)[:, None], "flag": torch.tensor(7)}
    parts = split_rows(batch, torch.arange(rows), session)
    assert torch.equal(torch.cat([part["input_ids"] for part, _ in parts]), batch["input_ids"])
    assert torch.equal(torch.cat([samples for _, samples in parts]), torch.arange(rows))
    assert len({len(samples) for _, samples in parts}) == 1 and all(part["flag"] == 7 for part, _ in parts)
    assert len(parts) == number or rows % number


def test_models_of_a_provider() -> None:
    model, own = toy_model("gpt2"), toy_model("gpt2", seed=1)
    assert provided(Plugin(), model) == (model, None)
    assert provided(Plugin(provider=lambda pre_process=True, post_process=True: own), model) == (own, None)
    assert provided(Plugin(provider=lambda: "gpt"), model) == (model, "gpt")
    assert provided(Plugin(provider=lambda: own, prepare=lambda provider: [provider()]), model) == (own, None)


def test_what_a_provider_must_return() -> None:
    model = toy_model("gpt2")
    with pytest.raises(ConfigError, match="You must provide a `custom_model_provider_function`"):
        provided(Plugin(prepare=lambda provider: model), model)
    with pytest.raises(ConfigError, match="must return a model of transformers, or"):
        provided(Plugin(provider=lambda: GPT), model)
    with pytest.raises(ConfigError, match="found Linear"):
        provided(Plugin(provider=lambda **parts: torch.nn.Linear(2, 2)), model)
    with pytest.raises(ConfigError, match="unknown model"):
        provided(Plugin(provider=lambda: "gbt"), model)
