"""Sampling: the fast loop equals running the whole text for every token, whatever shares the batch."""

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import src.engine.sampling
from src.engine.kv_cache import unpad
from src.engine.sampling import Completions, Sampler, decode, pick_tokens
from tests.helpers import (
    ARCHITECTURES,
    VOCABULARY,
    plain_logps,
    plain_sample,
    random_texts,
    tiny_model,
    word_tokenizer,
)

END_IDS = [1, 2, 5, 8, 13, 21, 34, 55, 89]  # about one token in ten, so that completions end everywhere
LENGTHS = (5, 11, 2, 20, 7)
SHAPES = ((LENGTHS, 2, 12), ((3,), 1, 4), ((20, 2), 3, 16), (LENGTHS, 2, 12))  # prompts, rows of each, tokens
LAST_UNIFORM = 1 - 2**-24  # the largest number that torch.rand gives


def draw(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed))


def texts_of(completions: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]


def plain_texts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    temperature: float,
    end_ids: Sequence[int] = END_IDS,
) -> list[list[int]]:
    """What `generate` should give for these prompts and uniform numbers, as many rows a prompt as there are."""
    group = len(uniforms) // len(prompts)
    return [plain_sample(model, prompts[b // group], u, temperature, end_ids) for b, u in enumerate(uniforms.tolist())]


@dataclass(frozen=True)
class Case:
    """Five prompts and what the plain way samples for them, two rows each."""

    model: PreTrainedModel
    prompts: list[list[int]]
    settings: dict[str, Any]
    expected: list[list[int]]

    def check(self, sampler: Sampler) -> None:
        out = sampler.generate(self.prompts, **self.settings)
        assert_completions(out, self.expected, self.model, self.prompts, self.settings["temperature"])


@cache
def plain_case(kind: str, temperature: float) -> Case:
    model, prompts, uniforms = tiny_model(kind), random_texts(LENGTHS, 1), draw(10, 16)
    settings = {"group_size": 2, "max_new_tokens": 16, "temperature": temperature, "uniforms": uniforms}
    return Case(model, prompts, settings, plain_texts(model, prompts, uniforms, temperature))


def assert_completions(
    out: Completions,
    expected: list[list[int]],
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    end_ids: Sequence[int] = END_IDS,
) -> None:
    """Ids, mask, padding (token 1), log-probabilities and flags are those of the `expected` texts."""
    assert texts_of(out) == expected
    rows, width = out.ids.shape
    group = rows // len(prompts)
    for b, text in enumerate(expected):
        assert out.mask[b].tolist() == [True] * len(text) + [False] * (width - len(text))
        assert out.ids[b, len(text) :].eq(1).all() and out.logps[b, len(text) :].eq(0).all()
        assert bool(out.truncated[b]) == (text[-1] not in end_ids)
        with torch.no_grad():
            logps = plain_logps(model, prompts[b // group], text, temperature or 1.0)
        torch.testing.assert_close(out.logps[b, : len(text)], logps, atol=1e-4, rtol=0)


def check_calls(sampler: Sampler, model: PreTrainedModel) -> None:
    """Calls of several shapes, one after the other, each against the plain way."""
    for call, (lengths, group, width) in enumerate(SHAPES):
        prompts, uniforms = random_texts(lengths, call), draw(len(lengths) * group, width, call)
        out = sampler.generate(prompts, group_size=group, max_new_tokens=width, temperature=1.0, uniforms=uniforms)
        assert_completions(out, plain_texts(model, prompts, uniforms, 1.0), model, prompts, 1.0)


class TestPickTokens:
    PROBABILITIES = (0.1, 0.2, 0.0, 0.4, 0.3, 0.0)  # cdf 0.1 0.3 0.3 0.7 1.0 1.0
    CASES = (
        (0.0, 0),
        (0.09, 0),
        (0.11, 1),
        (0.29, 1),
        (0.31, 3),
        (0.69, 3),
        (0.71, 4),
        (0.99, 4),
        (LAST_UNIFORM, 4),
    )

    @pytest.mark.parametrize(("uniform", "token"), CASES)
    def test_the_token_is_the_first_whose_cdf_lies_above_the_uniform_number(self, uniform: float, token: int):
        ids, logps = pick_tokens(torch.tensor([self.PROBABILITIES]).log(), torch.tensor([uniform]), 1.0)
        assert ids.tolist() == [token]
        assert logps.tolist() == pytest.approx([math.log(self.PROBABILITIES[token])])

    @pytest.mark.parametrize(("uniform", "token"), [(0.02, 0), (0.04, 1), (0.16, 1), (0.17, 3), (0.69, 3), (0.71, 4)])
    def test_at_temperature_a_half_probabilities_are_squared(self, uniform: float, token: int):
        squares = [0.01 / 0.3, 0.04 / 0.3, 0.0, 0.16 / 0.3, 0.09 / 0.3, 0.0]  # cdf 0.033 0.167 0.167 0.7 1.0 1.0
        ids, logps = pick_tokens(torch.tensor([self.PROBABILITIES]).log(), torch.tensor([uniform]), 0.5)
        assert ids.tolist() == [token]
        assert logps.tolist() == pytest.approx([math.log(squares[token])], rel=1e-5)

    def test_temperature_zero_takes_the_most_likely_token_and_scores_it_at_one(self):
        logits = torch.tensor([self.PROBABILITIES, self.PROBABILITIES[::-1]]).log()
        ids, logps = pick_tokens(logits, torch.zeros(2), 0.0)
        assert ids.tolist() == [3, 2]
        assert logps.tolist() == pytest.approx([math.log(0.4)] * 2)

    def test_rows_are_independent(self):
        logits, uniforms = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)), draw(64, 1)[:, 0]
        together = pick_tokens(logits, uniforms, 0.8)
        for row in range(64):
            ids, logps = pick_tokens(logits[row : row + 1], uniforms[row : row + 1], 0.8)
            assert ids == together[0][row]
            torch.testing.assert_close(logps[0], together[1][row])

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    def test_tokens_come_as_often_as_the_softmax_says(self, temperature: float):
        # Evenly spread uniform numbers hit every interval of the cdf as often as its length says, give or take one.
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
        count = 20_000
        ids, _ = pick_tokens(logits.expand(count, -1), (torch.arange(count) + 0.5) / count, temperature)
        expected = (logits[0].double() / temperature).softmax(-1) * count
        assert (ids.bincount(minlength=VOCABULARY) - expected).abs().max() < 1.1

    def test_random_tokens_pass_a_chi_square_test(self):
        logits = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -1.0])
        uniforms = draw(60_000, 1, seed=5)[:, 0]
        ids, _ = pick_tokens(logits.expand(len(uniforms), -1), uniforms, 1.0)
        expected = logits.double().softmax(-1) * len(uniforms)
        statistic = ((ids.bincount(minlength=6) - expected) ** 2 / expected).sum()
        assert statistic < 20.5  # 5 degrees of freedom: exceeded once in a thousand times

    @pytest.mark.parametrize("uniform", [0.0, 0.5, LAST_UNIFORM])
    @pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0])
    def test_an_impossible_token_is_never_picked_from_a_large_vocabulary(self, uniform: float, temperature: float):
        logits = torch.full((1, 151_936), -math.inf)
        logits[:, 70_000:80_000] = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
        ids, logps = pick_tokens(logits, torch.tensor([uniform]), temperature)
        assert 70_000 <= int(ids) < 80_000 and logps.isfinite().all()

    @pytest.mark.parametrize("seed", range(20))
    def test_the_last_uniform_number_gives_a_possible_token_whatever_the_sum_rounds_to(self, seed: int):
        logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(seed)) * 3
        logits[:, -100:] = -math.inf
        ids, logps = pick_tokens(logits, torch.tensor([LAST_UNIFORM]), 1.0)
        assert int(ids) < 49_900 and logps.isfinite().all()

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_logits_that_are_not_finite_give_some_token_and_no_crash(self, bad: float, temperature: float):
        logits = torch.zeros(3, 10)
        logits[0], logits[1, 4] = bad, bad
        ids, _ = pick_tokens(logits, torch.tensor([0.0, 0.5, LAST_UNIFORM]), temperature)
        assert ids.min() >= 0 and ids.max() < 10

    def test_half_precision_logits_are_scored_in_single_precision(self):
        logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(3)).bfloat16()
        ids, logps = pick_tokens(logits, draw(4, 1)[:, 0], 0.7)
        expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)


class TestGenerate:
    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_it_equals_running_the_whole_text_for_every_token(self, kind: str, temperature: float):
        case = plain_case(kind, temperature)
        case.check(Sampler(case.model, END_IDS, 1, rows=3))

    @pytest.mark.parametrize("rows", [1, 2, 5, 64])
    def test_which_rows_share_a_batch_does_not_change_what_is_sampled(self, rows: int):
        case = plain_case("qwen2", 1.0)
        case.check(Sampler(case.model, END_IDS, 1, rows=rows))

    def test_a_prompt_alone_gives_what_it_gives_among_others(self):
        model, prompts, uniforms = tiny_model("gemma3_text"), random_texts(LENGTHS, 3), draw(10, 12)
        together = Sampler(model, END_IDS, 1, rows=4).generate(
            prompts, group_size=2, max_new_tokens=12, temperature=1.0, uniforms=uniforms
        )
        for q, prompt in enumerate(prompts):
            alone = Sampler(model, END_IDS, 1).generate(
                [prompt], group_size=2, max_new_tokens=12, temperature=1.0, uniforms=uniforms[2 * q : 2 * q + 2]
            )
            assert texts_of(alone) == texts_of(together)[2 * q : 2 * q + 2]

    @pytest.mark.parametrize("rows", [2, 64])
    @pytest.mark.parametrize("pad", ["an end token", "another token"])
    def test_a_completion_ends_with_its_first_end_token_whichever_that_is(self, pad: str, rows: int):
        model, prompts = tiny_model("qwen3"), random_texts(LENGTHS, 6)
        free = texts_of(Sampler(model, [VOCABULARY + 1], 0).generate(prompts, max_new_tokens=12))
        end_ids = [free[0][0], free[1][4], free[2][11]]
        pad_id = end_ids[1] if pad == "an end token" else VOCABULARY - 1
        out = Sampler(model, end_ids, pad_id, rows).generate(prompts, max_new_tokens=12)
        ends = [next((i for i, token in enumerate(text) if token in end_ids), None) for text in free]
        assert ends == [0, 4, 11, 10, None]
        assert texts_of(out) == [text if end is None else text[: end + 1] for text, end in zip(free, ends, strict=True)]
        assert out.truncated.tolist() == [end is None for end in ends]
        assert out.ids[~out.mask].eq(pad_id).all()

    def test_an_end_token_in_the_last_place_is_no_truncation(self):
        model, prompts = tiny_model("qwen3"), random_texts([6], 5)
        [free] = texts_of(Sampler(model, [VOCABULARY + 1], 0).generate(prompts, max_new_tokens=5))
        assert free[4] not in free[:4]
        out = Sampler(model, [free[4]], 0).generate(prompts, max_new_tokens=5)
        assert out.mask.all() and not out.truncated.any()

    def test_the_model_s_own_generation_settings_do_not_touch_sampling(self):
        prompts, uniforms = random_texts(LENGTHS, 6), draw(5, 12)
        plain, tuned = tiny_model(), tiny_model()
        tuned.generation_config.update(top_k=2, top_p=0.1, repetition_penalty=5.0, do_sample=True, temperature=0.1)
        outs = [
            Sampler(model, END_IDS, 1).generate(prompts, max_new_tokens=12, temperature=1.0, uniforms=uniforms)
            for model in (plain, tuned)
        ]
        assert texts_of(outs[0]) == texts_of(outs[1])
        assert torch.equal(outs[0].logps, outs[1].logps)

    def test_sampling_needs_uniform_numbers(self):
        with pytest.raises(ValueError, match="uniforms"):
            Sampler(tiny_model(), END_IDS, 1).generate([[3, 4]], max_new_tokens=2, temperature=1.0)

    def test_progress_counts_up_to_all_rows_and_shows_their_tokens(self):
        model, prompts, done, seen = tiny_model(), random_texts(LENGTHS, 7), [], []

        def on_progress(count: int, ids: Tensor) -> None:
            done.append(count)
            seen.append(ids.clone())

        out = Sampler(model, END_IDS, 1, rows=3).generate(prompts, max_new_tokens=8, on_progress=on_progress)
        assert done == sorted(done) and done[0] < 5 and done[-1] == 5
        assert torch.equal(seen[-1] >= 0, out.mask)
        assert all(torch.equal(ids[ids >= 0], out.ids[ids >= 0]) for ids in seen)

    def test_decoded_text_is_without_end_and_padding_tokens(self):
        tokenizer = word_tokenizer()
        texts = ["Tom has 3<end><pad><pad>", "<end> He has 4."]  # whatever the mask leaves out goes, too
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        mask = torch.tensor([[True] * 6 + [False] * 2, [True] * 6 + [False] * 2])
        assert decode(tokenizer, unpad(ids, mask)) == ["Tom has 3", " He has "]


class TestBuffers:
    """Calls share buffers: nothing of one call may reach the next."""

    def test_calls_of_any_shape_may_follow_each_other(self):
        model = tiny_model("mistral")
        check_calls(Sampler(model, END_IDS, 1, rows=4), model)

    def test_changed_weights_count_from_the_next_call_on(self):
        model, prompts = tiny_model(), random_texts(LENGTHS, 8)
        sampler = Sampler(model, END_IDS, 1)
        before = texts_of(sampler.generate(prompts, max_new_tokens=8))
        with torch.no_grad():
            for mine, new in zip(model.parameters(), tiny_model(seed=1).parameters(), strict=True):
                mine.copy_(new)
        after = texts_of(sampler.generate(prompts, max_new_tokens=8))
        assert after != before
        assert after == plain_texts(model, prompts, torch.zeros(5, 8), 0.0)

    def test_larger_buffers_let_go_of_the_old_ones_at_once(self):
        sampler, gone = Sampler(tiny_model(), END_IDS, 1), []
        gc.disable()  # a circle of references would wait for it, and a card has no room for both
        try:
            for width in (9, 300, 600):
                sampler.generate(random_texts((5, width), 1), max_new_tokens=4)
                gone.append(weakref.ref(sampler.cache.buffers[0]))
            assert [ref() is None for ref in gone] == [True, True, False]
        finally:
            gc.enable()

    def test_what_a_call_rounds_is_the_same_to_the_bit_after_a_call_with_longer_prompts(self, monkeypatch):
        # Buffers with hardly a column to spare, and rows that start late, so that the columns are used up and move.
        monkeypatch.setattr(src.engine.sampling, "GRAPH_WIDTH", 4)
        model, prompts, uniforms = tiny_model(), random_texts([3, 2, 4] * 4, 5), draw(12, 20, 1)
        used, fresh = (Sampler(model, END_IDS[:4], 1, rows=4) for _ in range(2))
        used.generate(random_texts([90], 6), max_new_tokens=20)
        first, second = (
            sampler.generate(prompts, max_new_tokens=20, temperature=1.0, uniforms=uniforms)
            for sampler in (used, fresh)
        )
        assert torch.equal(first.ids, second.ids) and torch.equal(first.logps, second.logps)

    def test_a_result_stays_what_it_was_when_the_sampler_goes_on(self):
        model, prompts, uniforms = tiny_model(), random_texts(LENGTHS, 9), draw(5, 8)
        sampler = Sampler(model, END_IDS, 1)
        first = sampler.generate(prompts, max_new_tokens=8, temperature=1.0, uniforms=uniforms)
        kept = [tensor.clone() for tensor in (first.ids, first.mask, first.logps, first.truncated)]
        sampler.generate(prompts, max_new_tokens=8, temperature=1.0, uniforms=1 - uniforms)
        assert all(map(torch.equal, kept, (first.ids, first.mask, first.logps, first.truncated)))
