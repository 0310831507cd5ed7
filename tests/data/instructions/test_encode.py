"""Tokens and masks of chats and completions: those of transformers, and just what the assistant writes."""

import numpy as np
import pytest
import transformers

from megalith.common.errors import DataError
from megalith.data.instructions.encode import ChatEncoder, CompletionEncoder, TemplateError, turn_end
from megalith.data.instructions.records import Chat, Completion
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.data.tokenizers.tokenizer import load_tokenizer
from tests.chats import CHATML, GEMMA, TEMPLATES, unmarked, write_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [
    {"role": "user", "content": "What is two and two? Réponds 東京!"},
    {"role": "assistant", "content": "It is four; c'est 四 🙂."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "One and one  and one and one."},
]
ANSWERS = [MESSAGES[1]["content"], MESSAGES[3]["content"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder(folder, source: str, **options) -> ChatEncoder:
    template = ChatTemplate(load_tokenizer(folder), source)
    return ChatEncoder(template, turn_end(template), **options)


def encode(made: ChatEncoder, messages, trained=(True, True)):
    (found,) = made.encode([Chat(messages, trained=trained)])
    return found


def runs(made: ChatEncoder, sample) -> list[str]:
    """The texts of the runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], sample.trained, [False])))).reshape(-1, 2)
    return [made.template.backend.decode(sample.ids[a:b].tolist(), skip_special_tokens=False) for a, b in edges]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_the_mask_covers_what_the_assistant_writes(folder, name, marks):
    marked, end, system = TEMPLATES[name]
    source, messages = marked if marks else unmarked(marked), [SYSTEM, *MESSAGES] if system else MESSAGES
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(
        messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    made = encoder(folder, source)
    sample = encode(made, messages)
    assert sample.ids.tolist() == wanted["input_ids"]
    space = " " if name == "llama2" else ""
    assert runs(made, sample) == [f"{space}{answer}{space}{end}" for answer in ANSWERS]
    if name != "llama2":  # whose marks leave the end out, which here is trained all the same
        assert sample.trained.tolist() == [bool(mask) for mask in wanted["assistant_masks"]]


def test_end_of_a_turn_is_found_in_the_template(folder):
    tokenizer = load_tokenizer(folder)
    for marked, end, _ in TEMPLATES.values():
        assert turn_end(ChatTemplate(tokenizer, marked)) == tokenizer.backend.token_to_id(end)
    assert turn_end(ChatTemplate(tokenizer, "{{ messages[1].content }}\n")) is None
    assert turn_end(ChatTemplate(tokenizer, "{{ raise_exception('no') }}")) is None


def test_end_is_trained_where_padding_is_the_same_token(tmp_path):
    same = write_tokenizer(tmp_path, pad_token="<|im_end|>", eos_token="<|im_end|>")
    for source in (CHATML, unmarked(CHATML)):
        made = encoder(same, source)
        assert [run[-10:] for run in runs(made, encode(made, MESSAGES))] == ["<|im_end|>"] * 2


def test_turns_of_weight_0_are_not_trained(folder):
    for source in (GEMMA, unmarked(GEMMA)):
        made = encoder(folder, source)
        assert runs(made, encode(made, MESSAGES, (False, True))) == [ANSWERS[1] + "<end_of_turn>"]


def test_turns_of_weight_0_are_not_trained_where_prompts_are(folder):
    """All but the turn and its end."""
    for source in (GEMMA, unmarked(GEMMA)):
        made = encoder(folder, source, assistant_only=False)
        sample = encode(made, MESSAGES, (False, True))
        alone = encode(encoder(folder, source), MESSAGES, (True, False))
        assert runs(encoder(folder, source), alone) == [ANSWERS[0] + "<end_of_turn>"]
        assert (sample.trained == ~alone.trained).all()


def test_span_at_token_0_is_of_the_assistant_alone(folder):
    """A mask that begins at the first token: transformers#47325 took it for none, and trained the rest."""
    source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    source += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    made = encoder(folder, source)
    sample = encode(made, [{"role": "assistant", "content": "Four."}, {"role": "user", "content": "Why?"}], [True])
    assert runs(made, sample) == ["Four.</s>"] and sample.trained[0]


def test_every_token_is_trained_where_that_is_asked_for(folder):
    assert encode(encoder(folder, CHATML, assistant_only=False), MESSAGES).trained.all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        # Marks in a branch that no chat takes: the mask of stock templates without marks, as transformers has it.
        (unmarked(CHATML) + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "must mark .*im_start"),
        # What it wrote of the first turn is gone when another follows, as of templates that strip earlier thinking.
        (
            "{% for m in messages %}{{ m.role }}:{% if loop.last or m.role == 'user' %}{{ m.content }}{{ eos_token }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            "begins as the same chat with fewer turns.*four.*with more turns.*assistant:user",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "must end a turn .* with </s>"),
    ],
)  # fmt: skip
def test_templates_that_are_at_fault_are_errors_that_show_the_text(folder, source, words):
    tokenizer = load_tokenizer(folder)
    made = ChatEncoder(ChatTemplate(tokenizer, source), tokenizer.eod)
    with pytest.raises(TemplateError, match=words) as caught:
        list(made.encode([Chat(MESSAGES, trained=[True, True])]))
    assert caught.value.number == 0


def test_chats_that_the_template_does_not_take_are_named_and_others_encoded(folder):
    made = encoder(folder, GEMMA)
    refused, taken = made.encode(
        [Chat([SYSTEM, *MESSAGES], trained=[True, True]), Chat(MESSAGES, trained=[True, True])]
    )
    assert "System role not supported" in refused and taken.trained.any()


def test_completions_are_prompt_answer_and_end(folder):
    tokenizer = load_tokenizer(folder)
    made = CompletionEncoder(tokenizer)
    (sample,) = made.encode([Completion("What is two and", " two?")])
    prompt, whole = tokenizer.encode("What is two and"), tokenizer.encode("What is two and two?")
    assert whole[: len(prompt)] == prompt
    assert sample.ids.tolist() == [*whole, tokenizer.eod]
    assert sample.trained.tolist() == [False] * len(prompt) + [True] * (len(whole) - len(prompt) + 1)


def test_where_prompt_and_answer_merge_the_prompt_is_that_of_generation(folder):
    tokenizer = load_tokenizer(folder)
    prompt, answer, both = (tokenizer.encode(text) for text in ("the an", "swer is", "the answer is"))
    assert both[: len(prompt)] != prompt
    (sample,) = CompletionEncoder(tokenizer).encode([Completion("the an", "swer is")])
    assert sample.ids.tolist() == [*prompt, *answer, tokenizer.eod]
    (sample,) = CompletionEncoder(tokenizer).encode([Completion("", "four")])
    assert sample.ids[0] == tokenizer.eod and sample.trained.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_what_a_tokenizer_adds_to_every_text_is_added_once(tmp_path, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.prefix, tokenizer.suffix = [tokenizer.bos], [tokenizer.eos]
    (sample,) = CompletionEncoder(tokenizer).encode([Completion("two", " and")])
    assert sample.ids.tolist() == [tokenizer.bos, *tokenizer.encode("two and")[1:-1], tokenizer.eos]
    (pair,) = CompletionEncoder(tokenizer, decoder=True).encode([Completion("two", " and")])
    assert pair.ids[~pair.trained].tolist() == tokenizer.encode("two")
    assert pair.ids[pair.trained].tolist() == tokenizer.encode(" and")[1:]


def test_a_tokenizer_without_an_end_is_an_error(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eod = None
    with pytest.raises(DataError, match="must have the eod token"):
        CompletionEncoder(tokenizer)
