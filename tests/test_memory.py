"""The estimate of memory against what is really allocated."""

import logging
import weakref

import pytest
import torch
from torch import Tensor

from src.engine.logprobs import accumulate_gradients
from src.engine.lora import add_lora
from src.engine.optim import MasterAdamW
from src.engine.sampling import Sampler
from src.grpo import GRPOConfig
from src.memory import activation_bytes, activations, advice, estimate_memory, report_memory
from tests.helpers import ARCHITECTURES, make_batch, random_texts, tiny_model
from tests.test_grpo import learn, make_rollout, make_trainer

SETTINGS = {"max_prompt_tokens": 40, "max_completion_tokens": 30, "prompts_per_step": 3, "group_size": 4}
GB = 10**9
PARTS = {"weights": 3, "fp32 masters": 6, "Adam": 12, "gradients": 6, "reference": 3, "KV cache": 1, "logits": 0}
PARTS = {name: count * GB for name, count in PARTS.items()} | {"activations": 60 * GB}


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "rank"), [*((kind, None) for kind in ARCHITECTURES), ("qwen2", 4), ("phi", 4)])
def test_weights_optimizer_reference_and_cache_are_counted_to_the_byte(kind, rank, dtype, kl_coef):
    model = tiny_model(kind).to(dtype)
    if rank:
        pytest.importorskip("peft")
        add_lora(model, rank, seed=0)
    trainer = make_trainer(model, kl_coef=kl_coef)
    parts, _ = estimate_memory(model, trainer.sampler, GRPOConfig(**SETTINGS, kl_coef=kl_coef))
    learn(trainer, make_rollout(trainer), 1e-3)
    state = trainer.optimizer.state_tensors()
    masters = [m for name, m in trainer.optimizer.master.items() if m is not trainer.optimizer.params[name]]
    assert parts["weights"] == size([*model.parameters(), *model.buffers()])
    assert parts["fp32 masters"] == size(masters) and bool(masters) == (dtype != torch.float32)
    assert parts["Adam"] == size([tensor for name, tensor in state.items() if name.startswith("adam/")])
    assert parts["gradients"] == size([torch.empty_like(m) for m in trainer.optimizer.master.values()])
    assert parts["reference"] == size(list((trainer.reference or {}).values()))
    trainer.sampler.generate(random_texts([40] * 64, 1), max_new_tokens=30)
    layers = trainer.sampler.cache.layers
    assert parts["KV cache"] == size([buffer for layer in layers for buffer in (layer.keys, layer.values)])


@pytest.mark.parametrize(("kind", "tokens"), [("qwen2", 20), ("llama", 20), ("gemma3_text", 20), ("qwen2", 150)])
def test_activations_are_those_that_a_step_keeps(kind: str, tokens: int):
    model = tiny_model(kind)
    prompt, completion = activation_bytes(model, tokens, tokens // 2)
    batch = make_batch(random_texts([tokens] * 3, 1), random_texts([tokens // 2] * 12, 2))
    saved = SavedBytes()
    with saved:
        accumulate_gradients(
            model, batch, torch.arange(12), lambda row, column, logps: logps.sum(), temperature=1.0, token_budget=10**6
        )
    fixed = size(list(model.parameters()))  # weights are saved, too, which are there anyway
    # Long texts are measured on short ones; in a model as narrow as this their masks, which grow faster, still show.
    assert 3 * prompt + 12 * completion == pytest.approx(saved.most, abs=fixed, rel=0.2 if tokens > 32 else 0)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most that autograd has kept at the same time, each storage once."""

    def __init__(self):
        self.saved: list[weakref.ref] = []
        self.most = 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        self.saved.append(weakref.ref(tensor))
        alive = [kept.untyped_storage() for each in self.saved if (kept := each()) is not None]
        self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return tensor


def test_a_micro_batch_has_no_more_rows_than_the_step_and_at_least_one():
    config = GRPOConfig(**SETTINGS)
    assert activations(1000, 1, config, 10**6) == 3 * 1000 + 12
    assert activations(1000, 1, config, 90) == 2 * 1000 + 3
    assert activations(1000, 1, config, 1) == 1000 + 1


def test_measuring_leaves_no_gradient_and_no_change():
    model = tiny_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    estimate_memory(model, Sampler(model, [1], 0), GRPOConfig(**SETTINGS))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not MasterAdamW(model).adam.state


def test_on_cuda_the_memory_of_the_sampler_s_graphs_comes_on_top(gpu):
    logits = []
    for rows in (0, 64):
        model = tiny_model().cuda()
        parts, _ = estimate_memory(model, Sampler(model, [1], 0, rows), GRPOConfig(**SETTINGS))
        logits.append(parts["logits"])
    # A chunk of 2^27 logits in the learner. In the sampler, fp32 each: logits, log-softmax, probabilities, sums; and
    # four bytes for a copy in the model's precision.
    assert logits == [12 * 2**27, 12 * 2**27 + 64 * 97 * (4 * 4 + 4)]


def test_the_shortest_texts_can_be_measured():
    shortest = {"max_prompt_tokens": 2, "max_completion_tokens": 1}
    for settings in (shortest, shortest | {"max_completion_tokens": 200}, shortest | {"max_prompt_tokens": 200}):
        parts, _ = estimate_memory(tiny_model(), Sampler(tiny_model(), [1], 0), GRPOConfig(**settings))
        assert parts["activations"] > 0


def test_the_log_names_the_parts_and_their_sum(caplog):
    model = tiny_model()
    with caplog.at_level(logging.INFO, "src.memory"):
        report_memory(model, Sampler(model, [1], 0), GRPOConfig(**SETTINGS))
    [record] = caplog.records
    assert record.message.startswith("memory: at most about 0.1 GB: weights 0.00, ")
    assert "logits 0.10" in record.message and "fp32 masters" not in record.message


class TestAdvice:
    def test_the_largest_budget_that_fits_is_named(self):
        model = tiny_model()
        config = GRPOConfig(**SETTINGS, token_budget=256)
        parts, fits = estimate_memory(model, Sampler(model, [1], 0), config)
        rest = sum(parts.values()) - parts["activations"]
        texts = activation_bytes(model, 40, 30)
        for budget in (128, 64, 32):
            assert fits(int((rest + activations(*texts, config, budget)) / 0.9) + 1) == budget
        assert fits(rest) is None

    def test_every_change_comes_with_what_it_saves(self):
        assert advice(PARTS, GRPOConfig(), 2048) == (
            "When texts get that long, --token_budget 2048 fits; --lora_rank 32 saves about 27.0 GB; "
            "--kl_coef 0 saves about 3.0 GB"
        )
        adapter = PARTS | {"fp32 masters": GB // 10, "Adam": GB // 5, "gradients": GB // 10, "reference": 0}
        assert advice(adapter, GRPOConfig(prompts_per_step=16), None) == (
            "No --token_budget makes it fit; half the --prompts_per_step or --group_size saves about 0.5 GB; "
            "or choose a smaller --model"
        )
