"""Sampling as on CUDA: the decisions of that path on the CPU, then captured graphs, on a card or the stand-in."""

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import src.engine.kv_cache
import src.engine.sampling
from src.engine.sampling import Sampler
from tests.helpers import ARCHITECTURES, random_texts, tiny_model
from tests.pretend_gpu import PretendGPU
from tests.test_sampling import END_IDS, LENGTHS, SHAPES, assert_completions, check_calls, draw, plain_case, plain_texts


@pytest.fixture
def sampler_as_on_cuda(monkeypatch: pytest.MonkeyPatch):
    """Samplers that take every decision of the CUDA path, with a step where that replays a graph."""
    monkeypatch.setattr(Sampler, "_capture", Sampler._step)

    def make(model: PreTrainedModel, end_ids: Sequence[int] = END_IDS, pad_id: int = 1, rows: int = 3) -> Sampler:
        sampler = Sampler(model, end_ids, pad_id, rows)
        sampler.on_cuda, sampler.captures, sampler.check_every = True, True, 8
        return sampler

    return make


class TestTheLoopForCuda:
    """The decisions of the CUDA path on the CPU: fixed slots, widths in buckets, rows noticed late."""

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_it_equals_running_the_whole_text_for_every_token(self, kind, temperature, sampler_as_on_cuda):
        case = plain_case(kind, temperature)
        case.check(sampler_as_on_cuda(case.model, rows=5))

    @pytest.mark.parametrize("rows", [2, 64])
    def test_idle_slots_and_refilled_ones_do_not_change_what_is_sampled(self, rows, sampler_as_on_cuda):
        case = plain_case("qwen2", 1.0)
        case.check(sampler_as_on_cuda(case.model, rows=rows))

    def test_calls_of_any_shape_may_follow_each_other(self, sampler_as_on_cuda):
        model = tiny_model("mistral")
        check_calls(sampler_as_on_cuda(model, rows=9), model)

    def test_every_slot_sees_a_column_at_every_step_and_call(self, sampler_as_on_cuda, monkeypatch):
        # A query that sees nothing has a softmax of nothing: NaN with some kernels, which then stays in the buffers.
        seen, masks = [], src.engine.kv_cache.attention_masks
        monkeypatch.setattr(src.engine.kv_cache, "attention_masks", lambda *args: seen.append(masks(*args)) or seen[-1])
        sampler = sampler_as_on_cuda(tiny_model(), rows=4)
        for lengths in ((20, 3), (20, 3), (20, 3, 12, 9), (7, 2)):
            sampler.generate(random_texts(lengths, 5), max_new_tokens=8)
        assert all((mask == 0).any(-1).all() for mask in seen)
        assert {mask.shape[-2] for mask in seen} == {1, 6, 19}  # decoding, and the prompts but for their last tokens

    def test_every_width_is_a_multiple_of_the_bucket(self, sampler_as_on_cuda, monkeypatch):
        monkeypatch.setattr(src.engine.sampling, "GRAPH_WIDTH", 8)
        widths = []
        monkeypatch.setattr(Sampler, "_capture", lambda self, t: (widths.append(self.cache.width), self._step(t)))
        sampler_as_on_cuda(tiny_model()).generate(random_texts(LENGTHS, 3), max_new_tokens=16)
        assert len(set(widths)) > 2 and all(width % 8 == 0 for width in widths)

    @pytest.mark.parametrize("as_on_cuda", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
    def test_columns_move_when_the_buffers_are_full(self, kind, as_on_cuda, sampler_as_on_cuda, monkeypatch):
        # Buffers with hardly a column to spare, and a row that starts late and runs long.
        monkeypatch.setattr(src.engine.sampling, "GRAPH_WIDTH", 4)
        full, advance = [], Sampler._advance

        def watching(sampler: Sampler, temperature: float) -> None:
            full.append(sampler.cache.end == sampler.columns)
            advance(sampler, temperature)

        monkeypatch.setattr(Sampler, "_advance", watching)
        end_ids, prompts, uniforms = END_IDS[:4], random_texts([3, 2, 4] * 4, 5), draw(12, 20, 1)
        model = tiny_model(kind)
        sampler = (sampler_as_on_cuda if as_on_cuda else Sampler)(model, end_ids, 1, rows=4)
        out = sampler.generate(prompts, max_new_tokens=20, temperature=1.0, uniforms=uniforms)
        assert any(full)
        assert_completions(out, plain_texts(model, prompts, uniforms, 1.0, end_ids), model, prompts, 1.0, end_ids)


@pytest.mark.usefixtures("gpu")
class TestOnCuda:
    """Captured graphs against eager steps; the same uniform numbers on both sides."""

    @pytest.mark.parametrize("rows", [5, 64])
    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
    def test_captured_graphs_sample_what_the_cpu_samples(self, kind, temperature, rows, monkeypatch):
        monkeypatch.setitem(src.engine.kv_cache.WORTH_SHARING, "cuda", 1)
        prompts, uniforms = [[7, 8, 9, *text] for text in random_texts(LENGTHS, 1)], draw(10, 24)
        plain_texts(tiny_model(kind), prompts, uniforms, temperature, END_IDS)  # no draw is left to rounding
        settings = {"group_size": 2, "max_new_tokens": 24, "temperature": temperature, "uniforms": uniforms}
        on_cpu = Sampler(tiny_model(kind), END_IDS, 1).generate(prompts, **settings)
        sampler = Sampler(tiny_model(kind).cuda(), END_IDS, 1, rows)
        for _ in range(2):  # the second call replays the graphs of the first
            out = sampler.generate(prompts, **settings)
            assert torch.equal(out.ids.cpu(), on_cpu.ids) and torch.equal(out.mask.cpu(), on_cpu.mask)
            assert torch.equal(out.truncated.cpu(), on_cpu.truncated)
            torch.testing.assert_close(out.logps.cpu(), on_cpu.logps, atol=1e-3, rtol=0)
        assert sampler.graphs

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    def test_a_rotary_embedding_that_looks_at_positions_steps_without_a_graph_and_says_so(self, kind: str, caplog):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
        model, prompts = tiny_model("llama", rope_parameters=rope, max_position_embeddings=64), random_texts((5, 9), 1)
        expected = Sampler(model, END_IDS, 1).generate(prompts, max_new_tokens=16)
        sampler = Sampler(copy.deepcopy(model).cuda(), END_IDS, 1, rows=4)
        assert torch.equal(sampler.generate(prompts, max_new_tokens=16).ids.cpu(), expected.ids)
        assert not sampler.graphs
        assert [message for message in caplog.messages if f"'{kind}'" in message and "without CUDA graphs" in message]

    def test_new_buffers_get_new_graphs(self):
        slow, fast = Sampler(tiny_model(), END_IDS, 1), Sampler(tiny_model().cuda(), END_IDS, 1, rows=4)
        for lengths in ((5, 9), (5, 200), (5, 9)):  # as many and as wide, behind a longer prompt
            prompts = random_texts(lengths, 1)
            expected = slow.generate(prompts, max_new_tokens=16)
            assert torch.equal(fast.generate(prompts, max_new_tokens=16).ids.cpu(), expected.ids)

    def test_smaller_calls_use_a_part_of_the_buffers_and_their_graphs_again(self, monkeypatch):
        # As validation between steps, and the attempts of dynamic sampling, which are ever smaller.
        monkeypatch.setattr(src.engine.sampling, "GRAPH_ROWS", 4)
        slow, fast, seen = Sampler(tiny_model(), END_IDS, 1), Sampler(tiny_model().cuda(), END_IDS, 1, rows=8), []
        for rows, tokens in ((20, 24), (8, 16), (3, 16), (5, 9), (1, 24), (20, 16), (8, 16)):
            prompts, uniforms = random_texts([5 + row % 7 for row in range(rows)], 1), draw(rows, tokens, 10)
            settings = {"max_new_tokens": tokens, "temperature": 1.0, "uniforms": uniforms}
            out, expected = fast.generate(prompts, **settings), slow.generate(prompts, **settings)
            assert torch.equal(out.ids.cpu(), expected.ids) and torch.equal(out.truncated.cpu(), expected.truncated)
            seen.append((fast.slots.active, dict(fast.graphs), fast.cache.buffers[0].data_ptr()))
        assert [active for active, *_ in seen] == [8, 8, 4, 8, 4, 8, 8]
        for (_, before, place), (_, after, same_place) in itertools.pairwise(seen):
            assert before.items() <= after.items() and place == same_place
        assert len(seen[0][1]) == 1 and len(seen[-1][1]) == 2  # for 8 rows, and for 4

    def test_a_card_takes_more_rows_at_a_time_than_a_cpu_as_far_as_its_memory_goes(self, monkeypatch):
        # A column has 2 layers x 2 x 2 heads x 8 numbers of 4 bytes; 5 + 8 + 8 columns become 128: 32 KiB a row.
        prompts, active = random_texts([5] * 300, 1), []
        for gigabytes in (24, 16 * 200 * 2**15 / 1e9, 1e-6):
            card = SimpleNamespace(total_memory=int(gigabytes * 1e9))
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
            sampler = Sampler(tiny_model().cuda(), END_IDS, 1)
            sampler.generate(prompts, max_new_tokens=8)
            active.append(sampler.slots.active)
        assert active == [256, 192, 64]
        on_cpu, seen = Sampler(tiny_model(), END_IDS, 1), []
        on_cpu.generate(prompts[:80], max_new_tokens=8, on_progress=lambda *_: seen.append(on_cpu.slots.active))
        assert max(seen) == 64

    def test_buffers_that_grow_stay_within_their_part_of_the_memory(self, monkeypatch):
        # Room for 200 rows of 128 columns, as above; a longer prompt after many short ones takes 384 columns.
        card = SimpleNamespace(total_memory=16 * 200 * 2**15)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        sampler, sizes = Sampler(tiny_model().cuda(), END_IDS, 1), []
        for lengths in ([5] * 300, [300] * 3, [5] * 300):
            sampler.generate(random_texts(lengths, 1), max_new_tokens=8)
            sizes.append((sampler.slots.active, *sampler.cache.buffers[0].shape[::2]))
        assert sizes == [(192, 192, 128), (64, 64, 384), (64, 64, 384)]

    def test_every_temperature_has_its_graphs(self):
        slow, fast = Sampler(tiny_model(), END_IDS, 1), Sampler(tiny_model().cuda(), END_IDS, 1, rows=4)
        prompts, uniforms = random_texts((5, 9), 1), draw(2, 16)
        for temperature in (0.0, 1.0, 0.7, 0.0):
            settings = {"max_new_tokens": 16, "temperature": temperature, "uniforms": uniforms}
            assert torch.equal(fast.generate(prompts, **settings).ids.cpu(), slow.generate(prompts, **settings).ids)

    def test_the_host_waits_for_the_gpu_once_in_eight_tokens(self, gpu: PretendGPU | None):
        if gpu is None:
            pytest.skip("only the stand-in counts")
        sampler, waits = Sampler(tiny_model().cuda(), [], 1, rows=4), []
        for tokens in (8, 48):
            sampler.generate(random_texts((5, 9), 1), max_new_tokens=tokens)  # captures the graphs
            before = gpu.waits
            sampler.generate(random_texts((5, 9), 1), max_new_tokens=tokens)
            waits.append(gpu.waits - before)
        assert waits[1] - waits[0] == 5  # looks at "who has finished"

    def test_graphs_follow_weights_that_change_in_place(self):
        model, prompts = tiny_model().cuda(), random_texts(LENGTHS, 2)
        sampler = Sampler(model, END_IDS, 1)
        sampler.generate(prompts, max_new_tokens=16)
        with torch.no_grad():
            for mine, new in zip(model.parameters(), tiny_model(seed=1).parameters(), strict=True):
                mine.copy_(new)
        expected = Sampler(tiny_model(seed=1), END_IDS, 1).generate(prompts, max_new_tokens=16)
        assert torch.equal(sampler.generate(prompts, max_new_tokens=16).ids.cpu(), expected.ids)

    def test_calls_of_any_shape_may_follow_each_other(self):
        model = tiny_model("mistral")
        slow, fast = Sampler(model, END_IDS, 1), Sampler(tiny_model("mistral").cuda(), END_IDS, 1, rows=9)
        for call, (lengths, group, width) in enumerate(SHAPES):
            prompts, uniforms = random_texts(lengths, call), draw(len(lengths) * group, width, call)
            settings = {"group_size": group, "max_new_tokens": width, "temperature": 1.0, "uniforms": uniforms}
            assert torch.equal(fast.generate(prompts, **settings).ids.cpu(), slow.generate(prompts, **settings).ids)
