"""A chat template is looked at before anything is computed: what it may not do, what is put right, what it is given."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train
from src.chat_template import render_prompts, set_template_arguments
from src.data import encode_prompts
from src.errors import UserError
from tests.helpers import word_tokenizer

ROLES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = ROLES + OPENING.replace("{% endif %}", THINKING + "{% endif %}")
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
LLAMA = (
    "\n  {%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "    {%- set date_string = strftime_now('%d %b %Y') %}\n  {%- endif %}\n{%- endif %}"
    "{{- '<|begin_of_text|>Today Date: ' + date_string + '\n' }}" + ROLES + OPENING
)
CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}] for question in ("Why?", "How?")
]


def tokenizer(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.name_or_path, made.chat_template = "some/model", template
    return made


def problem(template: str | dict[str, str]) -> str:
    with pytest.raises(
        UserError, match=r"^The chat template of 'some/model' .*: mend it, choose another model, or try"
    ):
        render_prompts(tokenizer(template), CHATS)
    with pytest.raises(UserError) as caught:
        encode_prompts(tokenizer(template), ["Why?"])
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("The chat template of 'some/model' ").partition(": mend it")[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['role'] }", "cannot be rendered (unexpected '}')"),
        ("{{ nosuch.thing }}" + ROLES + OPENING, "cannot be rendered ('nosuch' is undefined)"),
        ("{{ 1 // 0 }}" + ROLES + OPENING, "cannot be rendered (integer division or modulo by zero)"),
        ({"rag": ROLES, "tool_use": ROLES}, "cannot be rendered (This model has multiple chat templates"),
        (ROLES.replace("m['content']", "'x'") + OPENING, "leaves out what the user says"),
        (
            ROLES.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}") + OPENING,
            "leaves out what the user says",
        ),
        (OPENING, "leaves out what the user says"),
        (ROLES, "does not end where the reply begins, but with "),
        (ROLES + OPENING.replace("{% endif %}", "<think>\n{% endif %}"), r"assistant\n<think>\n'"),
        (ROLES + "{{ range(99) | random }}" + OPENING, "writes another prompt each time"),
        ("", "leaves out what the user says"),
    ],
)
def test_a_template_that_asks_something_else_is_refused_in_one_line(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(99))
    monkeypatch.setattr("random.choice", lambda some: some[next(numbers)])
    assert words in problem(template)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ROLES + OPENING, "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN3, "How?<|im_end|>\n<|im_start|>assistant\n"),
        (
            ROLES.replace(
                "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}"
            )
            + OPENING,
            "How?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (GEMMA, "<start_of_turn>user\nBe brief.\n\nHow?<end_of_turn>\n<start_of_turn>model\n"),
        (MISTRAL, "Be brief.\n[INST] How? [/INST]"),
        (LLAMA, "How?<|im_end|>\n<|im_start|>assistant\n"),
        ({"default": ROLES + OPENING, "rag": ROLES}, "How?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_templates_of_every_family_are_taken(template: str, end: str) -> None:
    merged = [[{"role": "user", "content": f"Be brief.\n\n{chat[1]['content']}"}] for chat in CHATS]
    prompts = render_prompts(tokenizer(template), CHATS, merged)
    assert len(prompts) == 2 and "Why?" in prompts[0] and prompts[1].endswith(end)


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n  ", "  ", "{# x #}\n", "  {% if true %}a{% endif %}", "{%- if true %}\nb{% endif %}"]
)
def test_what_stands_before_the_template_leaves_no_trace(start: str) -> None:
    plain = tokenizer(start + ROLES + OPENING)
    expected = plain.apply_chat_template(CHATS, add_generation_prompt=True, tokenize=False)
    assert render_prompts(plain, CHATS) == expected
    set_template_arguments(plain, ["x=1", "y=two"])
    assert plain.apply_chat_template(CHATS, add_generation_prompt=True, tokenize=False) == expected


def test_the_date_is_the_same_every_day() -> None:
    [prompt, _] = render_prompts(tokenizer(LLAMA), CHATS)
    assert prompt.startswith("<|begin_of_text|>Today Date: 26 Jul 2024\n")
    given = tokenizer(LLAMA)
    set_template_arguments(given, ["date_string=1 Jan 2030"])
    assert render_prompts(given, CHATS)[0].startswith("<|begin_of_text|>Today Date: 1 Jan 2030\n")


class TestArguments:
    @pytest.mark.parametrize(
        ("argument", "written"),
        [
            ("x=false", "False bool"),
            ("x=true", "True bool"),
            ("x=null", "None none"),
            ("x=3", "3 number"),
            ("x=text", "text string"),
            ("x=a=b 'c' \"d\" %} \\ é", "a=b 'c' \"d\" %} \\ é string"),
            ('x="3"', "3 string"),
            ('x=["a"]', "['a'] list"),
        ],
    )
    def test_a_value_is_json_or_else_text(self, argument: str, written: str) -> None:
        kinds = {"bool": "boolean", "none": "none", "number": "number", "string": "string"}
        tests = "".join(f"{{% elif x is {test} %}}{kind}" for kind, test in kinds.items())
        given = tokenizer("{{ x }} {% if false %}" + tests + "{% else %}list{% endif %}")
        set_template_arguments(given, [argument])
        assert given.apply_chat_template(CHATS[:1], tokenize=False) == [written]

    def test_a_closed_thought_is_no_open_one(self) -> None:
        given = tokenizer(QWEN3)
        set_template_arguments(given, ["enable_thinking=false"])
        assert render_prompts(given, CHATS)[1].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def test_they_are_saved_with_the_template(self, tmp_path: Path) -> None:
        given = tokenizer({"rag": QWEN3, "other": ROLES})
        set_template_arguments(given, ["enable_thinking=false", "chat_template=rag"])
        given.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert render_prompts(loaded, CHATS) == render_prompts(given, CHATS)
        assert render_prompts(given, CHATS)[1].endswith("</think>\n\n")

    def test_given_again_they_take_the_place_of_those_saved_before(self) -> None:
        given = tokenizer("{% set own = 1 %}\n{{ x }} {{ y }} {{ own }}")
        set_template_arguments(given, ["x=old", "y=kept"])
        set_template_arguments(given, ["x=new"])
        assert given.apply_chat_template(CHATS[:1], tokenize=False) == ["new kept 1"]
        assert given.chat_template.count("{% set x = ") == 1

    @pytest.mark.parametrize("arguments", [["enable_thinking"], ["=1"], ["a b=1"], ["x=1", "-y=2"], ["x="]])
    def test_what_is_no_argument_is_refused(self, arguments: list[str]) -> None:
        with pytest.raises(
            UserError, match=r"^--template_arguments is .*: write NAME=VALUE, as in enable_thinking=false\.$"
        ):
            set_template_arguments(tokenizer(ROLES), arguments)

    def test_without_a_template_to_choose_they_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"^--template_arguments cannot be given to this model \(.* no default "):
            set_template_arguments(tokenizer({"rag": ROLES, "other": ROLES}), ["x=1"])

    def test_a_run_takes_them_and_says_so_when_they_are_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        flags = ["--preset", "tiny", "--max_steps", "1", "--cold_start_steps", "0", "--eval_samples", "2"]
        flags += ["--prompts_per_step", "2", "--group_size", "2", "--max_completion_tokens", "4"]
        assert train.main([*flags, "--template_arguments", "enable_thinking"]) == 1
        assert "--template_arguments is enable_thinking: write" in capsys.readouterr().err
        assert train.main([*flags, "--template_arguments", "enable_thinking=false"]) == 0
        saved = Path("checkpoints/final/chat_template.jinja").read_text(encoding="utf-8")
        assert saved.startswith("{% set enable_thinking = False %}\n")
