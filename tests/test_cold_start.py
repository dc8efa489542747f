"""The cold start: targets in the XML format, and the gradient of the plain cross-entropy on them."""

import pytest
import torch
from torch import Tensor, nn

import src.cold_start
from src.cold_start import ColdStart, supervised_gradients, target_batch
from src.data import SYSTEM_PROMPT, Example, encode_prompts, format_target
from src.engine.logprobs import Batch
from tests.helpers import assert_same, gradients, tiny_model, word_tokenizer

EXAMPLES = [
    Example("Tom has 3 apples. How many?", "He has 3 apples.", "He has 3 apples.", "3"),
    Example("Tom has 3 apples. He finds 4. How many has Tom now?", "3 + 4 = 7. Tom has 7 now.", "Tom has 7 now.", "7"),
    Example("How many?", "= 0.", "= 0.", "0"),
]


def batch(pad_id: int = 0) -> Batch:
    return target_batch(word_tokenizer(), EXAMPLES, pad_id, torch.device("cpu"), SYSTEM_PROMPT)


class TestTargets:
    def test_a_completion_is_the_xml_target_and_one_end_token(self):
        tokenizer, targets = word_tokenizer(), batch()
        for example, ids, mask in zip(EXAMPLES, targets.completion_ids, targets.completion_mask, strict=True):
            text = ids[mask].tolist()
            assert tokenizer.decode(text[:-1]) == format_target(example)
            assert text[-1] == tokenizer.eos_token_id and text.count(tokenizer.eos_token_id) == 1

    def test_a_target_ends_as_the_template_ends_a_reply_where_that_is_another_token(self):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "<start>", 1)
        targets = target_batch(tokenizer, EXAMPLES, 0, torch.device("cpu"), SYSTEM_PROMPT)
        ends = [ids[mask][-1].item() for ids, mask in zip(targets.completion_ids, targets.completion_mask, strict=True)]
        assert ends == [tokenizer.convert_tokens_to_ids("<start>")] * 3

    def test_a_prompt_is_what_the_sampler_is_given(self):
        tokenizer, targets = word_tokenizer(), batch()
        prompts = [ids[mask].tolist() for ids, mask in zip(targets.prompt_ids, targets.prompt_mask, strict=True)]
        assert prompts == encode_prompts(tokenizer, [example.question for example in EXAMPLES])
        assert targets.group_size == 1

    def test_prompts_are_padded_on_the_left_and_targets_on_the_right(self):
        targets = batch(pad_id=1)
        assert targets.prompt_mask[:, -1].all() and targets.completion_mask[:, 0].all()
        assert targets.prompt_mask.sum(-1).unique().numel() == targets.completion_mask.sum(-1).unique().numel() == 3
        assert targets.prompt_ids[~targets.prompt_mask].eq(1).all()
        assert targets.completion_ids[~targets.completion_mask].eq(1).all()


class TestGradients:
    @pytest.mark.parametrize("token_budget", [1, 40, 10**6])
    @pytest.mark.parametrize("pad", ["<pad>", "<end>"])
    def test_it_is_the_gradient_of_the_mean_cross_entropy_over_all_target_tokens(self, pad: str, token_budget: int):
        tokenizer, model, losses = word_tokenizer(), tiny_model("qwen2"), []
        prompts = encode_prompts(tokenizer, [example.question for example in EXAMPLES])
        for prompt, example in zip(prompts, EXAMPLES, strict=True):
            target = [*tokenizer(format_target(example))["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            losses += nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
        mean = torch.stack(losses).mean()
        mean.backward()
        expected = gradients(model)
        model.zero_grad()
        targets = batch(tokenizer.convert_tokens_to_ids(pad))
        loss = supervised_gradients(model, targets, torch.arange(len(EXAMPLES)), token_budget)
        assert loss == pytest.approx(float(mean.detach()), rel=1e-4)
        assert_same(gradients(model), expected)

    def test_the_end_token_is_trained_on(self):
        targets, model = batch(), tiny_model("qwen2")
        last = targets.completion_mask.sum(-1, keepdim=True) - 1
        without = torch.arange(targets.completion_ids.shape[1]) < last
        rows = torch.arange(len(EXAMPLES))
        loss = supervised_gradients(model, targets, rows, 10**6)
        shorter = Batch(targets.prompt_ids, targets.prompt_mask, targets.completion_ids, without)
        assert supervised_gradients(model, shorter, rows, 10**6) != pytest.approx(loss, rel=1e-3)


class TestFaults:
    def test_a_full_memory_halves_the_micro_batches_and_changes_nothing_else(self, monkeypatch):
        def train(fail: int) -> tuple[ColdStart, dict[str, float], list[int]]:
            work, budgets = supervised_gradients, []

            def failing(model: nn.Module, targets: Batch, rows: Tensor, budget: int) -> float:
                budgets.append(budget)
                loss = work(model, targets, rows, budget)
                if len(budgets) <= fail:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return loss

            monkeypatch.setattr(src.cold_start, "supervised_gradients", failing)
            trainer = ColdStart(tiny_model("qwen2"), 1.0, 512)
            metrics = trainer.step(batch(), 1e-2)
            del metrics["peak_memory"]  # of the whole process, so far
            monkeypatch.undo()
            return trainer, metrics, budgets

        (unharmed, expected, _), (harmed, metrics, budgets) = train(0), train(2)
        assert budgets == [512, 256, 128] and harmed.token_budget == 128
        assert metrics == pytest.approx(expected, rel=1e-4)
        for one, other in zip(unharmed.model.parameters(), harmed.model.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-4)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_loss_that_is_not_finite_moves_nothing_whatever_the_gradient(self, bad: float, monkeypatch):
        trainer = ColdStart(tiny_model("qwen2"), 1.0, 512)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        work = supervised_gradients
        monkeypatch.setattr(src.cold_start, "supervised_gradients", lambda *parts: work(*parts) + bad)
        metrics = trainer.step(batch(), 1e-2)
        assert metrics["skipped_steps"] == trainer.skips_in_a_row == 1 and metrics["grad_norm"] == 0
        monkeypatch.undo()
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        assert trainer.step(batch(), 1e-2)["skipped_steps"] == 1 and trainer.skips_in_a_row == 0
