import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data import encode_prompts, format_target, parse_row
from src.rewards import TAGS
from src.tiny import build_tiny_model, build_tiny_tokenizer, make_tiny, synthetic_rows
from tests.helpers import score

# The problems solved a second time, from the words of their questions alone.
SOLUTIONS = [
    (r"has (\d+) \w+ and finds (\d+) more\.", lambda a, b: a + b),
    (r"has (\d+) \w+ and gives (\d+) to", lambda a, b: a - b),
    (r"has (\d+) boxes of (\d+) \w+\. How", lambda m, n: m * n),
    (r"has (\d+) \w+, buys (\d+) and finds (\d+)\.", lambda a, b, c: a + b + c),
    (r"has (\d+) \w+, buys (\d+) and loses (\d+)\.", lambda a, b, c: a + b - c),
    (r"has (\d+) boxes of (\d+) \w+ and (\d+) more\.", lambda m, n, a: m * n + a),
    (r"has (\d+) \w+\. \w+ has (\d+) more than", lambda a, b: a + a + b),
    (r"bus has (\d+) people\. Then (\d+) get off, (\d+) get on and (\d+) get on", lambda a, b, c, d: a - b + c + d),
]
CALCULATION = re.compile(r"(\d+(?:[-+*]\d+)+)=<<([-+*\d]+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def splits():
    return {split: synthetic_rows(split, seed=0) for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows(splits):
    return splits["train"] + splits["test"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


def target(row):
    return format_target(parse_row(row["question"], row["answer"]))


def solve(question):
    """Which solution fits the question, the numbers it finds there, and the result."""
    fits = [(i, re.search(pattern, question)) for i, (pattern, _) in enumerate(SOLUTIONS)]
    ((kind, match),) = [(i, match) for i, match in fits if match]
    numbers = tuple(map(int, match.groups()))
    return kind, numbers, SOLUTIONS[kind][1](*numbers)


def test_every_answer_is_what_the_question_asks_for(rows):
    for row in rows:
        assert row["answer"].split("\n")[-1] == f"#### {solve(row['question'])[2]}"


def test_every_number_of_a_question_is_used(rows):
    for row in rows:
        assert sorted(solve(row["question"])[1]) == sorted(map(int, re.findall(r"\d+", row["question"])))


def test_every_calculator_mark_is_right_and_repeats_what_stands_around_it(rows):
    for row in rows:
        found = CALCULATION.findall(row["answer"])
        assert len(found) == row["answer"].count("<<") > 0
        for terms, marked_terms, marked_result, result in found:
            assert (terms, result) == (marked_terms, marked_result)
            assert eval(terms) == int(result)  # digits and signs only, the pattern sees to it


def test_the_last_calculation_gives_the_answer(rows):
    for row in rows:
        assert CALCULATION.findall(row["answer"])[-1][-1] == row["answer"].split("#### ")[1]


def test_problems_take_one_to_three_steps_of_every_operation(rows):
    assert {row["answer"].count("<<") for row in rows} == {1, 2, 3}
    terms = "".join(terms for row in rows for terms, *_ in CALCULATION.findall(row["answer"]))
    assert set(re.findall(r"\D", terms)) == {"+", "-", "*"}


def test_most_solutions_with_steps_to_skip_skip_them_in_every_situation_alike(rows):
    for kind in range(3, len(SOLUTIONS)):  # the first three take one step
        counts = [row["answer"].count("<<") for row in rows if solve(row["question"])[0] == kind]
        assert 0.55 < counts.count(1) / len(counts) < 0.75
        assert set(counts) == ({1, 3} if kind == 7 else {1, 2})


def test_every_situation_comes_in_both_splits(splits):
    for some in splits.values():
        kinds = Counter(solve(row["question"])[0] for row in some)
        assert len(kinds) == len(SOLUTIONS) >= 6
        assert min(kinds.values()) >= 4  # there are only 16 products


def test_all_numbers_lie_between_0_and_40(rows):
    for row in rows:
        assert all(0 <= int(number) <= 40 for number in re.findall(r"\d+", row["question"] + row["answer"]))
        assert not re.search(r"-\s*-|=\s*-|#### -", row["answer"])


def test_a_split_has_its_size_and_no_question_twice(splits):
    for split, size in (("train", 4000), ("test", 250)):
        assert len({row["question"] for row in splits[split]}) == len(splits[split]) == size


@pytest.mark.parametrize("test_seed", [0, 1])
def test_the_splits_share_no_problem_even_with_other_names_and_things(splits, test_seed):
    train, test = (
        {solve(row["question"])[:2] for row in some} for some in (splits["train"], synthetic_rows("test", test_seed))
    )
    assert len(test) == 250  # no test problem comes twice under other names
    assert not train & test


def test_the_seed_alone_decides_the_rows(splits):
    assert synthetic_rows("train", seed=0) == splits["train"]
    assert synthetic_rows("train", seed=1) != splits["train"]
    assert synthetic_rows("test", seed=0) == splits["test"]
    assert synthetic_rows("test", seed=1) != splits["test"]


@pytest.mark.parametrize("split", ["validation", "", "TRAIN"])
def test_an_unknown_split_is_an_error_that_names_it(split):
    with pytest.raises(ValueError, match=f"'{split}'"):
        synthetic_rows(split, seed=0)


def test_a_target_earns_every_reward_in_full_save_for_solutions_of_one_step(rows):
    rewards = score([target(row) for row in rows], [row["answer"].split("#### ")[1] for row in rows])
    for row, (formatting, reasoning, output_consistency, answer_accuracy) in zip(rows, rewards, strict=True):
        assert formatting == output_consistency == answer_accuracy == 1
        kind, _, _ = solve(row["question"])
        if row["answer"].count("<<") > 1:
            assert reasoning == 1
        elif kind >= 3:  # one calculation where there could be two or three
            assert reasoning == 0.5
        else:
            assert reasoning == 0.75  # one step, and statements


def test_questions_and_targets_come_back_exactly_from_their_tokens(tokenizer, rows):
    texts = [row["question"] for row in rows] + [target(row) for row in rows]
    assert tokenizer.batch_decode(tokenizer(texts).input_ids, skip_special_tokens=True) == texts


def test_every_word_and_every_number_is_one_token_whatever_the_seed(tokenizer):
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    word = re.compile(r"</?[a-z]+>|[A-Za-z]+|\d+|[^\sA-Za-z\d]")
    for seed in (0, 7):
        rows = synthetic_rows("train", seed) + synthetic_rows("test", seed)
        texts = [row["question"] for row in rows] + [target(row) for row in rows]
        for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            assert tokenizer.unk_token_id not in ids
            assert [piece.strip() for i in ids if (piece := pieces[i]).strip()] == word.findall(text)


def test_a_number_is_the_same_token_in_a_sentence_and_as_the_answer(tokenizer):
    for number in range(41):
        sentence, field = f"Tom has {number} apples.", f"<answer>{number}</answer>"
        shared = set(tokenizer.encode(sentence)) & set(tokenizer.encode(field))
        assert [tokenizer.decode([i]) for i in shared] == [str(number)]


def test_tags_are_single_tokens_that_survive_skipping_special_tokens(tokenizer):
    for tag in TAGS:
        (i,) = tokenizer.encode(tag, add_special_tokens=False)
        assert i not in tokenizer.all_special_ids
        assert tokenizer.decode([i], skip_special_tokens=True) == tag


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "Zoë paid £7.50 for 1,234 пирожки 🍎", "<answer><<<|im_end|>", "x" * 5000]
)
def test_any_text_can_be_encoded(tokenizer, text):
    assert all(0 <= i < len(tokenizer) for i in tokenizer.encode(text))
    assert encode_prompts(tokenizer, [text])[0]


def test_prompts_and_completions_are_short(tokenizer, rows):
    prompts = encode_prompts(tokenizer, [row["question"] for row in rows])
    assert max(map(len, prompts)) <= 48
    assert max(map(len, tokenizer([target(row) for row in rows]).input_ids)) < 60


def test_a_prompt_is_chatml_that_ends_where_the_assistant_begins(tokenizer):
    messages = [{"role": "user", "content": "Tom has 3 apples."}, {"role": "assistant", "content": "3"}]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nTom has 3 apples.<|im_end|>\n<|im_start|>assistant\n"
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n3<|im_end|>\n")


def test_a_turn_ends_with_one_end_token_and_padding_is_the_other(tokenizer):
    model = build_tiny_model(tokenizer, seed=0)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert len(set(ends)) == 2
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == ends[1]
    assert set(ends) <= set(tokenizer.all_special_ids)


def test_the_model_is_tiny_and_knows_every_token(tokenizer):
    model = build_tiny_model(tokenizer, seed=0)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 250_000 < sum(weight.numel() for weight in model.parameters()) < 500_000


def test_the_seed_alone_decides_the_weights_and_the_global_random_state_stays(tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (build_tiny_model(tokenizer, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_saved_and_loaded_by_the_auto_classes_nothing_changes(tmp_path, rows):
    model, tokenizer = make_tiny(seed=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [target(row) for row in rows[:200]] + ["Zoë has 3 apples, or 777?", " <|im_end|> 5"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.batch_decode(loaded(texts).input_ids) == tokenizer.batch_decode(tokenizer(texts).input_ids)
    questions = [row["question"] for row in rows[:50]]
    assert encode_prompts(loaded, questions) == encode_prompts(tokenizer, questions)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.padding_side == tokenizer.padding_side == "left"
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded_model.state_dict()[name], weight)
    assert loaded_model.generation_config.eos_token_id == model.generation_config.eos_token_id
