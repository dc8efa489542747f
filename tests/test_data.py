import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from src import data
from src.data import Example, encode_prompts, format_target, load_examples, parse_row
from src.errors import UserError
from tests.helpers import LONG, no_hang

CLIPS = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nShe sold 48+24 = <<48+24=72>>72 in all.\n#### 72",
}


def row(number: int) -> dict[str, str]:
    return {"question": f"q{number}", "answer": f"It is {number}.\n#### {number}"}


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(examples: list[Example]) -> list[str]:
    return [example.answer for example in examples]


def user_error(dataset: str, split: str = "train", **columns: Any) -> str:
    """The message of the UserError that loading raises: one line."""
    with pytest.raises(UserError) as caught:
        load_examples(dataset, split, **columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestParseRow:
    def test_a_row_becomes_question_reasoning_output_and_answer(self):
        assert parse_row(**CLIPS) == Example(
            question="How many clips?",
            reasoning="She sold 48/2 = 24 in May.\nShe sold 48+24 = 72 in all.",
            output="She sold 48+24 = 72 in all.",
            answer="72",
        )

    @pytest.mark.parametrize("answer", ["1,080", "-3", "0.25", "$9,500", "7 apples"])
    def test_the_answer_is_what_follows_the_mark_without_white_space(self, answer):
        assert parse_row("q", f"So it is.\n####   {answer} \n").answer == answer

    def test_the_last_separator_counts(self):
        example = parse_row("q", "Step #### one. Step two.\n#### 5\n#### 6")
        assert (example.reasoning, example.answer) == ("Step #### one. Step two.\n#### 5", "6")

    def test_line_ends_blank_lines_and_outer_white_space_are_normalised(self):
        example = parse_row(" q\r\n", "  One.\r\n\r\n Two. \r\n#### 2\r\n")
        assert (example.question, example.reasoning, example.output) == ("q", "One.\nTwo.", "Two.")

    @pytest.mark.parametrize(
        ("question", "answer", "reason"),
        [
            ("", "a\n#### 1", "empty question"),
            (" \n", "a\n#### 1", "empty question"),
            ("q", "", "empty answer"),
            ("q", "a\n#### ", "empty answer"),
            ("q", "a\n#### <<1=1>>", "empty answer"),
            ("q", "the answer is 3", "no ####"),
            ("q", "1+2 = <<1+2=33\n#### 3", "broken calculator mark"),
            ("q", "1+2 = 1+2=3>>3\n#### 3", "broken calculator mark"),
            ("q", "<<1+<<2+3=5>>=6>>6\n#### 6", "broken calculator mark"),
            ("q", "six\n#### <<6", "broken calculator mark"),
            ("q", "so <answer>3\n#### 3", "format tag in the text"),
            ("q", "so\n#### 3</answer>", "format tag in the text"),
            ("q", "a </reasoning> b\n#### 3", "format tag in the text"),
            ("q", "a <out<<1=1>>put> b\n#### 3", "format tag in the text"),
            ("why <REASONING>?", "a\n#### 3", "format tag in the text"),
        ],
    )
    def test_an_unusable_row_is_refused_with_its_reason(self, question, answer, reason):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            parse_row(question, answer)

    @pytest.mark.parametrize("answer", ["#### 3", "<<1+2=3>>\n#### 3", "...\n- \n#### 3"])
    def test_a_row_without_reasoning_has_neither_reasoning_nor_output(self, answer):
        assert parse_row("q", answer) == Example("q", "", "", "3")

    def test_comparisons_are_not_marks(self):
        assert parse_row("q", "Since 3 < 4 and 5>4, b wins.\n#### 4").reasoning == "Since 3 < 4 and 5>4, b wins."

    @pytest.mark.parametrize("piece", ["<<", ">", "<<1", ". ", ".", " ", ".\n", '." ', "Mr", "Mr. ", "####", "<answer"])
    def test_time_is_linear_in_the_length(self, piece):
        with no_hang():
            try:
                parse_row("q", piece * (LONG // len(piece)) + "So x.\n#### 1")
            except ValueError as reason:
                assert str(reason) == "broken calculator mark"


class TestAnswerPattern:
    @pytest.mark.parametrize(
        ("pattern", "answer", "reasoning", "final"),
        [
            ("whole", "72", "", "72"),
            ("whole", " Paris\n", "", "Paris"),
            ("whole", "a\n#### 72", "", "a\n#### 72"),
            ("####", "So it is.\n#### 72", "So it is.", "72"),
            ("boxed", r"So $x = \boxed{72}$.", "So $x = 72$.", "72"),
            ("boxed", r"It is $\boxed{\frac{1}{2}}$.", r"It is $\frac{1}{2}$.", r"\frac{1}{2}"),
            ("boxed", r"\boxed{\text{a {b {c}}}} end", r"\text{a {b {c}}} end", r"\text{a {b {c}}}"),
            ("boxed", r"First \boxed{1}, then \boxed {2}.", r"First \boxed{1}, then 2.", "2"),
            ("boxed", r"Set \fbox{\{1, 2\}}", r"Set \{1, 2\}", r"\{1, 2\}"),
            ("boxed", r"$\boxed{72}$", "$72$", "72"),
            (
                r"answer is (-?[\d.,]+\d)",
                "One. The answer is 7. Two.\nThe answer is 1,080.",
                "One. The answer is 7. Two.\nThe",
                "1,080",
            ),
            (r"^[^(]+", "9 (apples)", "", "9"),
            (r"[A-E]\b", "Since A is wrong, it is B", "Since A is wrong, it is", "B"),
            (r"\d+", "3 + 4 = 7", "3 + 4 =", "7"),
        ],
    )
    def test_it_says_where_the_final_answer_stands_and_what_is_reasoning(self, pattern, answer, reasoning, final):
        example = parse_row("q", answer, pattern)
        assert (example.reasoning, example.answer) == (reasoning, final)

    @pytest.mark.parametrize(
        ("pattern", "answer", "reason"),
        [
            ("boxed", "72", r"no \boxed{}"),
            ("boxed", r"\boxed{7", r"no \boxed{}"),
            ("boxed", r"\boxed{\frac{1}{2}", r"no \boxed{}"),
            ("boxed", r"so \boxed{ }", "empty answer"),
            (r"is (\d+)", "It is many", "no match of --answer_pattern"),
            (r"is( \d+)?", "It is many", "empty answer"),
        ],
    )
    def test_a_row_where_it_stands_nowhere_is_refused_with_a_reason(self, pattern, answer, reason):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            parse_row("q", answer, pattern)

    def test_time_is_linear_in_the_length_of_boxes(self):
        for piece in (r"\boxed{", "{", "}", r"\boxed{}"):
            with no_hang(), pytest.raises(ValueError):
                parse_row("q", piece * (LONG // len(piece)) + r"\boxed{", "boxed")

    def test_what_is_no_regular_expression_is_a_user_error(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1)] * 2)
        with pytest.raises(UserError, match=r"^--answer_pattern '\(' is no regular expression \(.*\): mend it\.$"):
            load_examples(path, "train", answer_pattern="(")


class TestColumns:
    def test_columns_have_the_names_that_are_given(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [{"Body": " Tom has 3. ", "Ask": "How many?", "Result": "3"}] * 2)
        examples, _ = load_examples(path, "train", 0, ["Body", "Ask"], "Result", "whole")
        assert examples == [Example("Tom has 3. How many?", "", "", "3")]
        with pytest.raises(UserError, match=r"no columns Body and answer \(it has Body, Ask, Result\): name its own"):
            load_examples(path, "train", 0, ["Body"])

    def test_numbers_are_final_answers_and_lose_a_decimal_zero(self, tmp_path):
        (tmp_path / "train.csv").write_text("question,answer\na,145.0\nb,0.5\nc,-3\nd,\n", encoding="utf-8")
        (tmp_path / "test.csv").write_text("question,answer\ne,1\n", encoding="utf-8")
        examples, dropped = load_examples(str(tmp_path), "train")
        assert answers(examples) == ["145", "0.5", "-3"] and dropped == {"empty answer": 1}
        assert not any(example.reasoning for example in examples)

    def test_the_other_columns_of_a_row_are_kept(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1) | {"level": n, "tags": ["a"]} for n in (1, 2)])
        [example] = load_examples(path, "train")[0]
        assert example.columns == {"level": 1, "tags": ["a"]}
        assert example == parse_row(**row(1)) and hash(example) == hash(parse_row(**row(1)))


class TestSystemPrompt:
    def test_it_is_the_text_of_a_file(self, tmp_path):
        for encoding in ("utf-8", "utf-8-sig"):  # Notepad writes a byte order mark
            (tmp_path / "prompt.txt").write_text("Réfléchis.\n", encoding=encoding)
            assert data.read_system_prompt(str(tmp_path / "prompt.txt")) == "Réfléchis."
        assert data.read_system_prompt(None) == data.SYSTEM_PROMPT

    def test_a_file_that_cannot_be_read_is_a_user_error(self, tmp_path):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for path in (tmp_path, tmp_path / "none", tmp_path / "binary"):
            with pytest.raises(UserError, match=r"^Cannot read --system_prompt_file '.*' \(.+\): give a text file\.$"):
                data.read_system_prompt(str(path))


class TestOutput:
    @pytest.mark.parametrize(
        ("reasoning", "output"),
        [
            ("He has 5.", "He has 5."),
            ("no full stop", "no full stop"),
            ("He has 5. She has 6.", "She has 6."),
            ("Is it 5? No! It is 6", "It is 6"),
            ("First line\nx=7", "x=7"),
            ("She pays $3.50.", "She pays $3.50."),
            ("It rains. She pays $3.50 now", "She pays $3.50 now"),
            ("It lasts 0.5 hours.", "It lasts 0.5 hours."),
            ("It rains. It lasts 0.5 hours.", "It lasts 0.5 hours."),
            ("He keeps .5 of it.", "He keeps .5 of it."),
            ("Add them. .5 + .25 = .75", ".5 + .25 = .75"),
            ("That is 1.5.2 and 1,000.00 in all.", "That is 1.5.2 and 1,000.00 in all."),
            ("He has $70. He adds $7.", "He adds $7."),
            ("Divide by 60. 120/60 = 2", "120/60 = 2"),
            ("Ask mom. $30 - $20 = $10", "$30 - $20 = $10"),
            ("At 7 a.m. and 8 p.m. he eats.", "At 7 a.m. and 8 p.m. he eats."),
            ("He came at 7 P.M. He left at 8 P.M.", "He left at 8 P.M."),
            ("So Mr. Smith and Mrs. Jones paid Dr. Who 5.", "So Mr. Smith and Mrs. Jones paid Dr. Who 5."),
            ("It has 80 sq. ft. = 80 tiles.", "It has 80 sq. ft. = 80 tiles."),
            ("It is half, i.e. 30/2 = 15.", "It is half, i.e. 30/2 = 15."),
            ("Use approx. 5 or St. Ives.", "Use approx. 5 or St. Ives."),
            ("After 14... seconds he stops.", "After 14... seconds he stops."),
            ('He said "I have 5." So it is 5.', "So it is 5."),
            ('He said (no.) "It is 5."', '"It is 5."'),
            ("It is 5.\n.\n", "It is 5."),
            ('Say "It is $350.  "', 'Say "It is $350.'),
            ("Il a 5 pommes. Élan: 6.", "Élan: 6."),
        ],
    )
    def test_the_output_is_the_last_meaningful_sentence(self, reasoning, output):
        assert parse_row("q", f"{reasoning}\n#### 1").output == output


class TestTarget:
    def test_the_target_has_the_three_fields_in_their_tags(self):
        assert format_target(Example("q", "One.\nTwo.", "Two.", "2")) == (
            "<reasoning>One.\nTwo.</reasoning> <output>Two.</output> <answer>2</answer>"
        )

    def test_the_system_prompt_shows_the_target_s_tags_in_order_and_ends_in_a_target(self):
        tags = re.findall(r"</?\w+>", format_target(parse_row(**CLIPS)))
        assert re.findall(r"</?\w+>", data.SYSTEM_PROMPT) == 2 * tags  # the form, and the example
        question = re.search(r'the problem "(.*)" reply', data.SYSTEM_PROMPT)[1]
        solution = (
            "The school has 6 * 20 = <<6*20=120>>120 pens.\nThe classes get 4 * 15 = <<4*15=60>>60 pens.\n"
            "There are 120 - 60 = <<120-60=60>>60 pens for the teachers.\n"
            "Each teacher gets 60 / 12 = <<60/12=5>>5 pens.\n#### 5"
        )
        assert data.SYSTEM_PROMPT.endswith(format_target(parse_row(question, solution)))


WORDS = ["<s>", "[UNK]", "system", "user", "assistant", "be", "brief", "how", "many", "why"]
ROLES = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
OPENING = "{% if add_generation_prompt %}assistant{% endif %}"
TEMPLATE = "{{ bos_token }}" + ROLES + OPENING
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
DROPPING = TEMPLATE.replace("messages %}", "messages if m.role != 'system' %}")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Word level: a word's id is its place in WORDS. Called plainly, it puts its own begin token in front."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", unk_token="[UNK]", chat_template=TEMPLATE, name_or_path="some/model"
    )


class TestPrompts:
    def test_messages_are_the_system_prompt_and_the_question(self):
        assert data.chat_messages("why", "be brief") == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "why"},
        ]

    def test_prompts_go_through_the_chat_template_with_one_begin_token(self, tokenizer):
        assert tokenizer("why")["input_ids"] == [0, 9]
        assert encode_prompts(tokenizer, ["how many", "why"], "be brief") == [
            [0, 2, 5, 6, 3, 7, 8, 4],
            [0, 2, 5, 6, 3, 9, 4],
        ]

    @pytest.mark.parametrize("template", [REFUSING, DROPPING])
    def test_without_a_system_role_the_system_prompt_opens_the_question(self, tokenizer, template):
        tokenizer.chat_template = template
        assert encode_prompts(tokenizer, ["how many", "why"], "be brief") == [
            [0, 3, 5, 6, 7, 8, 4],
            [0, 3, 5, 6, 9, 4],
        ]

    def test_the_default_system_prompt_reaches_the_model(self, tokenizer):
        words = len(data.SYSTEM_PROMPT.split())
        assert [len(ids) for ids in encode_prompts(tokenizer, ["why"])] == [words + 5]

    def test_no_questions_give_no_prompts(self, tokenizer):
        assert encode_prompts(tokenizer, []) == []

    def test_a_tokenizer_without_chat_template_is_a_user_error(self, tokenizer):
        tokenizer.chat_template = None
        with pytest.raises(UserError, match=r"^The chat template of 'some/model' cannot be rendered \(.* is not set"):
            encode_prompts(tokenizer, ["why"])
