import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import close_session, constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from src import data, rows
from src.data import Example, drop_long_prompts, encode_prompts, format_target, load_examples, parse_row
from src.errors import UserError

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


def user_error(dataset: str, split: str = "train") -> str:
    """The message of the UserError that loading raises: one line."""
    with pytest.raises(UserError) as caught:
        load_examples(dataset, split)
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
        start = time.perf_counter()
        try:
            parse_row("q", piece * (300_000 // len(piece)) + "So x.\n#### 1")
        except ValueError as reason:
            assert str(reason) == "broken calculator mark"
        assert time.perf_counter() - start < 3


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
        start = time.perf_counter()
        for piece in (r"\boxed{", "{", "}", r"\boxed{}"):
            with pytest.raises(ValueError):
                parse_row("q", piece * 100_000 + r"\boxed{", "boxed")
        assert time.perf_counter() - start < 3

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
        examples, dropped = load_examples(str(tmp_path), "train")
        assert answers(examples) == ["145", "0.5", "-3"] and dropped == {"empty answer": 1}
        assert not any(example.reasoning for example in examples)

    def test_the_other_columns_of_a_row_are_kept(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1) | {"level": n, "tags": ["a"]} for n in (1, 2)])
        [example] = load_examples(path, "train")[0]
        assert example.columns == {"level": 1, "tags": ["a"]}
        assert example == parse_row(**row(1)) and hash(example) == hash(parse_row(**row(1)))

    def test_other_columns_make_another_fingerprint(self, tmp_path):
        plain, easy, hard = (
            load_examples(write_jsonl(tmp_path / f"{i}.jsonl", [row(1) | extra] * 2), "train")[0]
            for i, extra in enumerate(({}, {"level": 1}, {"level": 2}))
        )
        assert len({data.fingerprint_examples(examples) for examples in (plain, easy, hard)}) == 3


class TestSystemPrompt:
    def test_it_is_the_text_of_a_file(self, tmp_path):
        (tmp_path / "prompt.txt").write_text("Réfléchis.\n", encoding="utf-8")
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

    def test_the_system_prompt_shows_the_target_s_tags_in_order(self):
        tags = re.findall(r"</?\w+>", format_target(parse_row(**CLIPS)))
        assert re.findall(r"</?\w+>", data.SYSTEM_PROMPT) == tags


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
        with pytest.raises(UserError, match=r"^The tokenizer of 'some/model' has no chat template.*instruct.*$"):
            encode_prompts(tokenizer, ["why"])

    def test_prompts_longer_than_the_limit_are_dropped_and_counted(self, tokenizer):
        short, long = Example("why", "r", "o", "1"), Example("how many", "r", "o", "2")  # 7 and 8 tokens
        examples = [long, short, long]
        assert drop_long_prompts(examples, tokenizer, 8, "be brief") == (examples, 0)
        assert drop_long_prompts(examples, tokenizer, 7, "be brief") == ([short], 2)
        assert drop_long_prompts(examples, tokenizer, 6, "be brief") == ([], 3)
        assert drop_long_prompts([], tokenizer, 6, "be brief") == ([], 0)


class TestLocalFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
    def test_every_format_gives_the_same_examples(self, tmp_path, suffix):
        path = tmp_path / f"train{suffix}"
        rows = [CLIPS, row(5)]
        table = datasets.Dataset.from_list(rows)
        if suffix == ".json":
            path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        elif suffix == ".csv":
            table.to_csv(path)
        elif suffix == ".parquet":
            table.to_parquet(path)
        else:
            write_jsonl(path, rows)
        assert load_examples(str(tmp_path), "train") == ([parse_row(**CLIPS), parse_row(**row(5))], Counter())

    def test_byte_order_mark_and_windows_line_ends_are_fine(self, tmp_path):
        lines = "".join(json.dumps(r) + "\r\n" for r in (CLIPS, row(5)))
        (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        (tmp_path / "test.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\nq5,"It is 5.\r\n#### 5"\r\n')
        assert load_examples(str(tmp_path), "train")[0] == [parse_row(**CLIPS), parse_row(**row(5))]
        assert load_examples(str(tmp_path), "test")[0] == [parse_row(**row(5))]

    def test_a_folder_gives_each_split_its_own_file(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", [row(1), row(2)])
        write_jsonl(tmp_path / "test.jsonl", [row(3)])
        (tmp_path / "train.txt").write_text("notes")
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["1", "2"]
        assert answers(load_examples(str(tmp_path), "test")[0]) == ["3"]

    @pytest.mark.parametrize(("rows", "test_rows"), [(2, 1), (19, 1), (30, 3), (12_000, 1000)])
    def test_the_last_tenth_of_a_single_file_is_its_test_split(self, tmp_path, rows, test_rows):
        path = write_jsonl(tmp_path / "all.jsonl", [row(i) for i in range(rows)])
        train, test = (answers(load_examples(path, split)[0]) for split in ("train", "test"))
        assert len(test) == test_rows
        assert train + test == [str(i) for i in range(rows)]

    def test_unusable_rows_are_counted_by_reason(self, tmp_path):
        rows = [
            row(1),
            {"question": None, "answer": "a\n#### 1"},
            {"question": "q", "answer": None},
            {"question": "q", "answer": 72},
            {"question": "q", "answer": "it is 72"},
            {"question": ["q"], "answer": "a\n#### 1"},
            {"question": 5, "answer": "It is 5.\n#### 5"},
            {"question": "q2", "answer": math.nan},
        ]
        write_jsonl(tmp_path / "train.jsonl", rows)
        examples, dropped = load_examples(str(tmp_path), "train")
        assert [(example.question, example.answer) for example in examples] == [("q1", "1"), ("q", "72"), ("5", "5")]
        assert dropped == {"empty question": 2, "empty answer": 2, "no ####": 1}

    def test_a_path_with_wildcards_or_a_tilde_is_taken_literally(self, tmp_path, monkeypatch):
        folder = tmp_path / "run[1] *"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", [row(1)])
        monkeypatch.setenv("HOME", str(tmp_path))
        assert answers(load_examples("~/run[1] *", "train")[0]) == ["1"]

    def test_a_changed_file_is_read_again_and_nothing_is_left_beside_it(self, tmp_path):
        path = tmp_path / "train.jsonl"
        write_jsonl(path, [row(1)])
        stat = path.stat()
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["1"]
        write_jsonl(path, [row(2)])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert answers(load_examples(str(tmp_path), "train")[0]) == ["2"]
        assert os.listdir(tmp_path) == ["train.jsonl"]

    def test_reading_is_silent_and_leaves_the_library_as_it_was(self, tmp_path, monkeypatch, caplog, capfd):
        write_jsonl(tmp_path / "train.jsonl", [row(1)])
        (tmp_path / "test.jsonl").write_bytes(bytes(range(256)))
        monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # so that caplog sees its messages
        datasets.enable_progress_bars()
        datasets.logging.set_verbosity(logging.WARNING)
        load_examples(str(tmp_path), "train")
        user_error(str(tmp_path), "test")
        assert caplog.messages == []
        assert capfd.readouterr() == ("", "")
        assert not datasets.are_progress_bars_disabled()
        assert datasets.logging.get_verbosity() == logging.WARNING


class TestLocalFailures:
    @pytest.mark.parametrize(
        "dataset", ["./none", "a/b/c", "none.jsonl", "data/none.csv", "/none", "~/none", "", "a\0b"]
    )
    def test_a_path_that_does_not_exist(self, tmp_path, monkeypatch, dataset):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_error(dataset).startswith(f"There is no file or folder '{dataset}': check the path")

    def test_a_folder_without_the_split(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", [row(1)])
        assert "should hold one file for the test split, but holds none" in user_error(str(tmp_path), "test")

    def test_a_folder_with_two_files_for_the_split(self, tmp_path):
        for name in ("train.jsonl", "train.json"):
            write_jsonl(tmp_path / name, [row(1)])
        assert "holds train.json and train.jsonl" in user_error(str(tmp_path))

    def test_an_unknown_split(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1), row(2)])
        for dataset in (path, str(tmp_path), "synthetic"):
            assert user_error(dataset, "dev") == f"'{dataset}' has no split 'dev': choose train or test."

    def test_an_unknown_format(self, tmp_path):
        (tmp_path / "rows.txt").write_text("q,a")
        assert "name should end in one of .jsonl, .json, .csv, .parquet" in user_error(str(tmp_path / "rows.txt"))

    @pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.parquet"])
    @pytest.mark.parametrize("content", [b"", bytes(range(256)) * 8, b"\x00" * 64], ids=["empty", "garbage", "zeros"])
    def test_an_empty_or_damaged_file(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        assert user_error(str(tmp_path)).startswith(
            (f"Cannot read rows from '{tmp_path / name}'", f"'{tmp_path / name}'")
        )

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("cut.jsonl", json.dumps(CLIPS).encode() + b"\n" + json.dumps(CLIPS).encode()[:-20]),
            ("blank.jsonl", b"\n\n"),
            ("none.json", b"[]"),
            ("number.json", b"3"),
            ("latin1.jsonl", '{"question": "café", "answer": "x\\n#### 1"}\n'.encode("latin-1")),
            ("latin1.csv", "question,answer\ncafé,x #### 1\n".encode("latin-1")),
            ("header.csv", b"question,answer\n"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        message = user_error(str(tmp_path / name))
        assert message.startswith(f"Cannot read rows from '{tmp_path / name}' (")
        assert message.endswith("check that the file is not empty or damaged, and that its text is UTF-8.")

    def test_a_missing_column_is_named_with_those_there(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [{"question": "q", "solution": "a"}] * 2)
        assert user_error(path) == (
            f"'{path}' has no columns question and answer (it has question, solution): "
            "name its own with --question_column and --answer_column."
        )

    def test_a_file_without_a_usable_row_says_why(self, tmp_path):
        write_jsonl(
            tmp_path / "train.jsonl", [{"question": "q", "answer": "72"}] * 2 + [{"question": "", "answer": "x"}]
        )
        assert "has no usable row (2 x no ####, 1 x empty question): add rows" in user_error(str(tmp_path))

    def test_a_single_row_leaves_the_train_split_empty(self, tmp_path):
        path = write_jsonl(tmp_path / "all.jsonl", [row(1)])
        assert f"The train split of '{path}' has no usable row (it is empty)" in user_error(path)


class TestSynthetic:
    def test_synthetic_rows_come_from_the_split_and_seed_asked_for(self, monkeypatch):
        def synthetic_rows(split: str, seed: int) -> list[dict[str, str]]:
            return [row({"train": 10, "test": 20}[split] + seed)]

        monkeypatch.setitem(sys.modules, "src.tiny", SimpleNamespace(synthetic_rows=synthetic_rows))
        assert answers(load_examples("synthetic", "train", seed=3)[0]) == ["13"]
        assert answers(load_examples("synthetic", "test")[0]) == ["20"]


class TestHub:
    """The network is never touched: `hub_problem` or `load_dataset` is replaced, or the endpoint is this machine."""

    @pytest.mark.parametrize(
        ("dataset", "config"), [("openai/gsm8k", "main"), ("someone/my.set-2", None), ("single_name", None)]
    )
    def test_a_hub_id_loads_with_its_config(self, monkeypatch, dataset, config):
        def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
            assert (path, name, split) == (dataset, config, "validation")
            return datasets.Dataset.from_list([CLIPS])

        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert load_examples(dataset, "validation") == ([parse_row(**CLIPS)], Counter())

    def test_without_network_the_cached_copy_is_used(self, monkeypatch):
        def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
            assert datasets.config.HF_HUB_OFFLINE
            return datasets.Dataset.from_list([CLIPS])

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(rows, "hub_problem", lambda: "no route to host")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert load_examples("openai/gsm8k", "train")[0] == [parse_row(**CLIPS)]
        assert not datasets.config.HF_HUB_OFFLINE

    def test_without_network_and_cache_it_fails_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(rows, "hub_problem", lambda: "no route to host")
        start = time.perf_counter()
        message = user_error("openai/gsm8k")
        assert time.perf_counter() - start < 2
        assert "train split of 'openai/gsm8k' from the Hugging Face Hub (no route to host)" in message
        assert "pass a local path, or `synthetic`" in message
        assert not datasets.config.HF_HUB_OFFLINE

    def test_what_the_hub_refuses_is_told_in_one_line(self, monkeypatch):
        def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
            raise ValueError('Unknown split "tset".\nShould be one of train, test.')

        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert '(Unknown split "tset". Should be one of train, test.)' in user_error("openai/gsm8k", "tset")

    def test_a_hub_dataset_without_the_columns_is_a_user_error(self, monkeypatch):
        monkeypatch.setattr(rows, "hub_problem", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"text": "x"}]))
        assert "'a/b' has no columns question and answer (it has text)" in user_error("a/b")

    def test_a_local_folder_wins_over_a_hub_id(self, tmp_path, monkeypatch):
        (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
        write_jsonl(tmp_path / "openai" / "gsm8k" / "train.jsonl", [row(1)])
        monkeypatch.chdir(tmp_path)
        assert answers(load_examples("openai/gsm8k", "train")[0]) == ["1"]

    def test_a_hub_that_does_not_answer_is_a_problem_within_the_timeout(self, monkeypatch):
        monkeypatch.setenv("NO_PROXY", "*")
        close_session()  # the next one reads the environment again
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            start = time.perf_counter()
            assert rows.hub_problem(timeout=0.2)
            assert time.perf_counter() - start < 2
        assert rows.hub_problem()  # now nobody listens there


@pytest.fixture(scope="module")
def real_examples() -> list[Example]:
    train, dropped_train = load_examples(os.environ["GSM8K_DIR"], "train")
    test, dropped_test = load_examples(os.environ["GSM8K_DIR"], "test")
    assert (len(train), len(test), dropped_train, dropped_test) == (7473, 1319, {}, {})
    return train + test


@pytest.mark.skipif("GSM8K_DIR" not in os.environ, reason="set GSM8K_DIR to a folder with GSM8K's train and test files")
class TestRealData:
    def test_no_target_holds_a_calculator_mark_or_a_foreign_tag(self, real_examples):
        for target in map(format_target, real_examples):
            assert "<<" not in target and ">>" not in target
            assert len(re.findall(r"</?(?:reasoning|output|answer)>", target)) == 6

    def test_the_output_ends_the_reasoning_and_starts_a_sentence(self, real_examples):
        for example in real_examples:
            before, _, after = example.reasoning.rpartition(example.output)
            assert not any(map(str.isalnum, after)), example.reasoning
            assert before == "" or re.search(r"\n\Z|[.!?][\"')]*\s+\Z", before), example.reasoning
            assert "\n" not in example.output

    def test_no_output_begins_inside_a_number(self, real_examples):
        for example in real_examples:
            before = example.reasoning.rpartition(example.output)[0]
            assert not re.search(r"[\d.,$]\Z", before), example.reasoning

    def test_every_answer_is_a_number(self, real_examples):
        for example in real_examples:
            assert re.fullmatch(r"-?\d[\d,]*(\.\d+)?", example.answer), example.answer
