"""A CPU in bf16 with fp32 masters: all that holds in fp32, and on CUDA in bf16, holds there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train

FLAGS = (
    "--preset tiny --cold_start_steps 3 --cold_start_batch_size 8 --max_steps 4 --prompts_per_step 2 --group_size 4"
    " --max_completion_tokens 12 --eval_samples 2 --save_every 2 --eval_every 0 --device cpu"
    " --learning_rate 1e-3 --kl_coef 0.5"
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def run(folder: Path, *flags: str) -> int:
    """train.py with a reward that differs from completion to completion, so that every step learns."""
    (folder / "length.py").write_text("def length(completion, answer):\n    return len(completion) / 100\n")
    places = ["--checkpoint_dir", f"{folder}/checkpoints", "--log_dir", f"{folder}/logs"]
    return train.main([*FLAGS.split(), *places, "--rewards", f"{folder}/length.py:length", *flags])


def result(folder: Path) -> tuple[list[dict], bytes, bytes]:
    """All metrics but those of time, and the files of weights and optimizer."""
    lines = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("seconds", "tokens_per_second", "peak_memory")
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in lines]
    final = folder / "checkpoints" / "final"
    return metrics, (final / "trainer.safetensors").read_bytes(), (final / "model.safetensors").read_bytes()


class TestRun:
    @pytest.mark.parametrize("more", ["", "--lora_rank 4"])
    def test_a_resumed_run_goes_on_in_its_own_type_and_ends_like_an_unbroken_one_to_the_bit(
        self, more: str, threads: int, tmp_path: Path
    ):
        if more:
            pytest.importorskip("peft")
        assert run(tmp_path, "--dtype", "bf16", *more.split()) == 0
        whole = result(tmp_path)
        assert [line["kl"] > 0 for line in whole[0] if line["phase"] == "grpo"] == [False, True, True, True]
        for start in ("cold_start", "step_000002"):  # left to itself, a model of this size would be in fp32
            assert run(tmp_path, "--resume", str(tmp_path / "checkpoints" / start), *more.split()) == 0
            assert result(tmp_path) == whole

    def test_a_checkpoint_is_in_bf16_with_masters_in_fp32_and_its_weights_are_the_rounded_masters(self, tmp_path: Path):
        assert run(tmp_path, "--dtype", "bf16") == 0
        final = tmp_path / "checkpoints" / "final"
        weights, state = load_file(final / "model.safetensors"), load_file(final / "trainer.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert all(torch.equal(tensor, state[f"master/{name}"].bfloat16()) for name, tensor in weights.items())
        assert any(not torch.equal(tensor.float(), state[f"master/{name}"]) for name, tensor in weights.items())

    def test_another_type_than_the_run_s_is_refused_unless_allowed(self, tmp_path: Path, capsys):
        assert run(tmp_path, "--dtype", "bf16", "--max_steps", "1") == 0
        assert run(tmp_path, "--resume", "--dtype", "fp32") == 1
        assert "dtype was bf16, is fp32" in capsys.readouterr().err.splitlines()[-1]
        assert run(tmp_path, "--resume", "--dtype", "fp32", "--allow_changes", "true") == 0
        assert load_file(tmp_path / "checkpoints/final/model.safetensors")["model.norm.weight"].dtype == torch.float32
