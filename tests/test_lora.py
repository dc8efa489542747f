"""LoRA: the gradient of plain autograd through peft, the reference as the adapter switched off, merged checkpoints."""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import train
from src.engine.lora import ADAPTER, ALPHA, add_lora, merged_state
from src.engine.models import save_model
from src.engine.optim import MasterAdamW
from src.engine.sampling import Sampler
from src.errors import UserError
from src.run.checkpoint import damage, save_checkpoint
from tests.helpers import (
    ARCHITECTURES,
    VOCABULARY,
    assert_same,
    gradients,
    random_texts,
    state,
    tiny_model,
    word_tokenizer,
)
from tests.test_grpo import TOTALS, PlainGRPO, learn, make_rollout, make_trainer, watch_updates

peft = pytest.importorskip("peft")
RANK = 4
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def lora_model(kind: str = "qwen2", **settings: Any) -> PreTrainedModel:
    model = tiny_model(kind, **settings)
    add_lora(model, RANK, seed=0)
    return model


def nudge(model: PreTrainedModel) -> PreTrainedModel:
    """An adapter that does something."""
    random = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn(param.shape, generator=random).to(param))
    return model


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def peft_twin(model: PreTrainedModel, kind: str) -> Any:
    """The same model and adapter, put together by peft's own wrapper."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    twin = peft.get_peft_model(tiny_model(kind), config).eval()
    twin.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in model.state_dict().items()})
    return twin


class SwitchedOff:
    """Called like a model: peft's with its adapter off."""

    def __init__(self, twin: Any):
        self.twin, self.device = twin, twin.device

    def __call__(self, **inputs: Any) -> Any:
        with self.twin.disable_adapter():
            return self.twin(**inputs)


class TestAdapters:
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(self, kind: str):
        model, plain = lora_model(kind), tiny_model(kind)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert type(model) is type(plain) and type(model.base_model) is type(plain.base_model)
        trained = {name for name, param in model.named_parameters() if param.requires_grad}
        assert trained == {name for name in model.state_dict() if ".lora_" in name}
        linear = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        assert trained == {f"{name}.lora_{half}.{ADAPTER}.weight" for name in linear for half in "AB"}

    def test_the_adapter_is_a_function_of_the_seed_and_leaves_the_global_random_state_alone(self):
        first, second, other = (tiny_model("qwen2") for _ in range(3))
        before = torch.random.get_rng_state()
        for model, seed in ((first, 0), (second, 0), (other, 1)):
            add_lora(model, RANK, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        expected = state_of(first)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in second.state_dict().items())
        assert any(not torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())

    def test_a_half_precision_adapter_has_fp32_masters_and_the_frozen_weights_have_none(self):
        model = tiny_model("qwen2").bfloat16()
        add_lora(model, RANK, seed=0)
        optimizer = MasterAdamW(model)
        assert {m.dtype for m in optimizer.master.values()} == {torch.float32}
        assert all(".lora_" in name for name in optimizer.master)
        assert all(param.dtype == torch.bfloat16 for param in model.parameters())

    def test_without_peft_one_line_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(UserError, match="pip install peft"):
            add_lora(tiny_model(), RANK, seed=0)


class TestStep:
    @pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text", "phi"])
    @pytest.mark.parametrize("kl_coef", [0.0, 0.3])
    def test_the_gradient_is_that_of_plain_autograd_through_peft(self, kind: str, kl_coef: float):
        model = lora_model(kind)
        trainer = make_trainer(model, kl_coef=kl_coef)  # moves base and adapter, after the reference was taken
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        rollout, twin = make_rollout(trainer), peft_twin(model, kind)
        plain = PlainGRPO(trainer, rollout, TOTALS)
        plain.model, plain.reference = twin, SwitchedOff(twin) if kl_coef else None
        loss = plain.backward()
        expected = {name.removeprefix("base_model.model."): grad for name, grad in gradients(twin).items()}
        seen = watch_updates(trainer)
        metrics = learn(trainer, rollout, 1e-2)
        assert_same(seen[0], expected)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        before = dict(twin.named_parameters())
        assert all(not torch.equal(p, before[f"base_model.model.{n}"]) for n, p in trained.items())

    def test_the_reference_is_the_adapter_switched_off_to_the_bit_and_no_copy_of_the_model(self):
        trainer = make_trainer(lora_model(), kl_coef=0.3)
        assert all(".lora_" in name for name in trainer.reference)
        with trainer.reference_weights(), torch.no_grad():
            logits = trainer.model(IDS).logits
        with switched_off(trainer.model), torch.no_grad():
            assert torch.equal(trainer.model(IDS).logits, logits)

    def test_after_a_cold_start_the_reference_is_the_adapter_as_it_then_was(self):
        model = nudge(lora_model())
        with torch.no_grad():
            logits = model(IDS).logits
        trainer = make_trainer(model, kl_coef=0.3)
        with torch.no_grad():
            for param, start in zip(model.parameters(), nudge(lora_model()).parameters(), strict=True):
                if not param.requires_grad:
                    param.copy_(start)  # make_trainer moved the base weights too
            with trainer.reference_weights():
                assert torch.equal(model(IDS).logits, logits)
            assert not torch.equal(model(IDS).logits, logits)

    def test_the_sampler_samples_with_the_adapter(self):
        model, prompts = nudge(lora_model()), random_texts((5, 9), 1)
        merged = tiny_model("qwen2")
        merged.load_state_dict(merged_state(model))
        outs = [Sampler(m, [1], 0).generate(prompts, max_new_tokens=12) for m in (model, merged, tiny_model("qwen2"))]
        assert torch.equal(outs[0].ids, outs[1].ids) and not torch.equal(outs[0].ids, outs[2].ids)
        torch.testing.assert_close(outs[0].logps, outs[1].logps, atol=1e-4, rtol=0)


@contextmanager
def switched_off(model: PreTrainedModel) -> Any:
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


class TestCheckpoint:
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_it_is_an_ordinary_merged_model(self, kind: str, tmp_path: Path):
        model, folder = nudge(lora_model(kind)), tmp_path / "final"
        before = state_of(model)
        for _ in range(2):  # saving twice must not add the adapter twice
            save_checkpoint(folder, partial(save_model, model, word_tokenizer()), {}, state())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert damage(folder) is None and not [path for path in folder.rglob("*") if "adapter" in path.name]
        merged, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert merged.state_dict().keys() == tiny_model(kind).state_dict().keys()
        with torch.no_grad():
            logits = model(IDS).logits
            torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-4, rtol=1e-4)
            assert (tiny_model(kind)(IDS).logits - logits).abs().max() > 0.1

    def test_half_precision_weights_are_added_up_in_fp32_and_rounded_once(self):
        model = tiny_model("qwen2").bfloat16()
        add_lora(model, RANK, seed=0)
        nudge(model)
        name = "model.layers.1.mlp.down_proj"
        layer = model.get_submodule(name)
        a, b = (half[ADAPTER].weight.double() for half in (layer.lora_A, layer.lora_B))
        exact = layer.get_base_layer().weight.double() + b @ a * ALPHA / RANK
        merged = merged_state(model)[f"{name}.weight"]
        assert merged.dtype == torch.bfloat16
        assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()  # a bf16 number has 8 bits


class TestRun:
    FLAGS = (
        "--preset tiny --cold_start_steps 3 --cold_start_batch_size 8 --max_steps 4 --prompts_per_step 2 --group_size 4"
        " --max_completion_tokens 12 --eval_samples 2 --save_every 2 --eval_every 0 --device cpu"
        " --learning_rate 1e-2 --kl_coef 0.5 --lora_rank 4"
    )

    def run(self, folder: Path, *flags: str) -> int:
        (folder / "length.py").write_text("def length(completion, answer):\n    return len(completion) / 100\n")
        places = ["--checkpoint_dir", str(folder / "checkpoints"), "--log_dir", str(folder / "logs")]
        rewards = ["--rewards", f"{folder}/length.py:length"]  # differs, so that every step learns
        return train.main([*self.FLAGS.split(), *places, *rewards, *flags])

    def result(self, folder: Path) -> tuple[list[dict], bytes, bytes]:
        lines = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clock = ("seconds", "tokens_per_second", "peak_memory")
        metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in lines]
        final = folder / "checkpoints" / "final"
        return metrics, (final / "trainer.safetensors").read_bytes(), (final / "model.safetensors").read_bytes()

    def test_a_resumed_run_ends_exactly_like_an_unbroken_one_its_reference_included(self, tmp_path: Path):
        assert self.run(tmp_path) == 0
        whole = self.result(tmp_path)
        assert [line["kl"] > 0 for line in whole[0] if line["phase"] == "grpo"] == [False, True, True, True]
        for start in ("cold_start", "step_000002"):
            assert self.run(tmp_path, "--resume", str(tmp_path / "checkpoints" / start)) == 0
            assert self.result(tmp_path) == whole

    def test_a_run_of_another_kind_is_refused_in_one_line(self, tmp_path: Path, capsys):
        assert self.run(tmp_path, "--max_steps", "1") == 0
        assert self.run(tmp_path, "--resume", "--lora_rank", "8") == 1
        assert "lora_rank was 4, is 8" in capsys.readouterr().err.splitlines()[-1]
        assert self.run(tmp_path, "--resume", "--lora_rank", "8", "--allow_changes", "true") == 1
        assert "does not fit this program and model" in capsys.readouterr().err.splitlines()[-1]
        assert self.run(tmp_path, "--lora_rank", "0") == 1
        assert "--lora_rank is 0: give 1 or more" in capsys.readouterr().err.splitlines()[-1]
