import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data import encode_prompts, format_target, parse_row
from src.problems import synthetic_rows
from src.rewards import TAGS
from src.tiny import TINY_SYSTEM_PROMPT, build_tiny_model, build_tiny_tokenizer, make_tiny


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows("train", 0) + synthetic_rows("test", 0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


def target(row):
    return format_target(parse_row(row["question"], row["answer"]))


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
    assert encode_prompts(tokenizer, [text], TINY_SYSTEM_PROMPT)[0]


def test_prompts_and_completions_are_short(tokenizer, rows):
    prompts = encode_prompts(tokenizer, [row["question"] for row in rows], TINY_SYSTEM_PROMPT)
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
    assert encode_prompts(loaded, questions, TINY_SYSTEM_PROMPT) == encode_prompts(
        tokenizer, questions, TINY_SYSTEM_PROMPT
    )
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.padding_side == tokenizer.padding_side == "left"
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded_model.state_dict()[name], weight)
    assert loaded_model.generation_config.eos_token_id == model.generation_config.eos_token_id
