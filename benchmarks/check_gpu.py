"""Is this card fit for training, and how far from its limits is a step? A few minutes, for everyone with a card.

    python benchmarks/check_gpu.py                  random weights in the shape of Qwen2.5-0.5B
    python benchmarks/check_gpu.py --model DIR --dataset PATH

Runs the tests marked `cuda`, then real steps of the default shape, whose prompts and lengths change from step to step:
with random weights a completion ends by chance, and is paid for its length. The floor of sampling is the time to read
weights, keys and values once a token, at the bandwidth measured here; that of scoring a completion under the reference
and of learning is their products, at the rate measured here; that of the optimizer is reading and writing its numbers.
"""

import argparse
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.bench_decode import bandwidth, step_bytes
from benchmarks.common import SHAPES, describe, finish, model_folder, synchronize, table
from src.data import load_examples
from src.engine.kv_cache import common_length, unpad
from src.engine.models import end_token_ids, load_model, pad_token_id
from src.engine.processes import Processes
from src.engine.sampling import Sampler
from src.grpo import PARTS, GRPOConfig, GRPOTrainer
from src.reward_set import Reward, RewardSet, built_in

TESTS_SECONDS = 180
LARGEST_GAP = 0.05  # mean difference of sampler and learner in a token's log-probability; bf16 gives about 0.01
OPTIMIZER_BYTES = 30  # a number: gradient, master and both moments read, these three written, the weight written


def product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Operations a second of a square product, two for each pair of numbers; the best of ten."""
    a, best = torch.ones(width, width, device=device, dtype=dtype), 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * width**3 / (time.perf_counter() - start))
    return best


def run_tests() -> str:
    """The last line that pytest prints about the tests that need a card."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-x"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=TESTS_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TESTS_SECONDS} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if done.returncode == 0 else f"not as expected: {' '.join(lines[-3:])}"


def driver() -> str:
    """The version of NVIDIA's driver."""
    if not (program := shutil.which("nvidia-smi")):
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]


def take_steps(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The model, and the metrics of `args.steps` steps with the counts of their `prompt_tokens` and `shared_tokens`."""
    model, tokenizer = load_model(model_folder(args.model, args.shape, device), device)
    names = ("prompts_per_step", "group_size", "max_completion_tokens")
    config, ends, rewards = GRPOConfig(**{n: getattr(args, n) for n in names}), end_token_ids(model, tokenizer), None
    if args.shape != "pretrained":  # one token in 200 is an end token: about as long as answers are
        ends = list(range(0, model.config.vocab_size, 200))
        rewards = RewardSet([Reward("length", 1.0, lambda completion: len(completion) / 1000)])
    examples = load_examples(args.dataset, "train")[0]
    sampler = Sampler(model, ends, pad_token_id(tokenizer), config.prompts_per_step * config.group_size)
    trainer, metrics = GRPOTrainer(model, tokenizer, sampler, config, rewards=rewards or built_in()), []
    for step in range(args.steps):
        problems = [examples[(step * args.prompts_per_step + q) % len(examples)] for q in range(args.prompts_per_step)]
        done, rollout = trainer.step(step, problems)
        prompts = unpad(rollout.batch.prompt_ids, rollout.batch.prompt_mask)
        lengths = {"prompt_tokens": sum(map(len, prompts)), "shared_tokens": len(prompts) * common_length(prompts)}
        metrics.append(done | {name: float(value) for name, value in lengths.items()})
    return model, metrics


def floors(
    model: PreTrainedModel, step: dict[str, float], args: argparse.Namespace, speed: float, rate: float
) -> dict[str, float]:
    """The least seconds that each part of such a step can take."""
    rows, numbers = args.prompts_per_step * args.group_size, model.num_parameters()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = numbers - sum(weight.numel() for weight in {head, embedding})
    prompt, tokens = step["prompt_tokens"] / args.prompts_per_step, rows * step["completion_tokens"]
    read = step["completion_tokens_max"] * step_bytes(model, rows, int(prompt + step["completion_tokens"] / 2))
    apart = step["prompt_tokens"] - step["shared_tokens"] * (1 - 1 / args.prompts_per_step)  # each shared token once
    once = 2 * ((body + head.numel()) * tokens + body * apart) / rate  # through the model
    optimizer = OPTIMIZER_BYTES * numbers / speed
    return {"sampling": read / speed, "reference": once, "learning": 3 * once, "optimizer": optimizer}


def complaints(steps: list[dict[str, float]], tests: str | None) -> list[str]:
    """What is wrong, if anything is."""
    wrong = [f"the tests: {tests}"] if tests and not re.match(r"\d+ passed", tests) else []
    if any(not math.isfinite(value) for step in steps for value in step.values()):
        wrong.append("a metric is not finite")
    if skipped := int(steps[-1]["skipped_steps"]):
        wrong.append(f"{skipped} steps were skipped, for a loss or gradient that was not finite")
    if (gap := max(step["logp_gap"] for step in steps)) > LARGEST_GAP:
        wrong.append(f"sampler and learner differ by {gap:.3f} a token (logp_gap)")
    return wrong


def report(steps: list[dict[str, float]], least: dict[str, float]) -> dict[str, Any]:
    """Print the medians without the first step, which captures graphs; return them."""
    rest: Callable[[str], float] = lambda name: statistics.median(step[name] for step in steps[1:])  # noqa: E731
    rows, figures = [], {name: rest(name) for name in ("seconds", "tokens_per_second")}
    for part in PARTS:
        figures[f"seconds/{part}"] = seconds = rest(f"seconds/{part}")
        share = [f"{least[part]:.4f}", f"{least[part] / seconds:.0%}"] if part in least else ["", ""]
        rows.append([part, f"{seconds:.4f}", *share])
    whole = sum(least.values())
    rows.append(["step", f"{figures['seconds']:.4f}", f"{whole:.4f}", f"{whole / figures['seconds']:.0%}"])
    print(table(["part", "s", "floor, s", "share of the floor"], rows))
    figures |= {"slowest_step": max(step["seconds"] for step in steps[1:]), "first_step": steps[0]["seconds"]}
    figures |= {name: max(step[name] for step in steps) for name in ("peak_memory", "logp_gap", "skipped_steps")}
    figures["ms_a_token"] = 1000 * statistics.median(
        step["seconds/sampling"] / step["completion_tokens_max"] for step in steps[1:]
    )
    print("\n" + "\n".join(f"{name} {value:.4g}" for name, value in figures.items() if "/" not in name))
    return figures | {"floors": least}


def main(argv: list[str] | None = None) -> int:
    """Check as the flags say; 1 when something is wrong."""
    default = GRPOConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id instead of random weights; or tiny")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=[*SHAPES], help="of random weights")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--prompts_per_step", type=int, default=default.prompts_per_step)
    parser.add_argument("--group_size", type=int, default=default.group_size)
    parser.add_argument("--max_completion_tokens", type=int, default=default.max_completion_tokens)
    parser.add_argument("--steps", type=int, default=20, help="2 or more")
    parser.add_argument("--skip_tests", action="store_true")
    parser.add_argument("--buffer_mb", type=int, default=1024, help="that is read for the bandwidth")
    parser.add_argument("--width", type=int, default=8192, help="of the product for the rate")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = Processes().choose_device(args.device)
    args.model, args.shape = args.model or "tiny", "pretrained" if args.model else args.shape
    about = describe(device) | {"driver": driver(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    about["tests"] = None if args.skip_tests or device.type == "cpu" else run_tests()
    print(f"tests: {about['tests'] or 'left out'}\n")
    model, steps = take_steps(args, device)
    about |= {"bandwidth": bandwidth(device, args.buffer_mb * 2**20)}
    about |= {"product_rate": product_rate(device, model.dtype, args.width)}
    middle = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    figures = report(steps, floors(model, middle, args, about["bandwidth"], about["product_rate"]))
    print(f"bandwidth {about['bandwidth'] / 1e9:.0f} GB/s, products {about['product_rate'] / 1e12:.3g} TFLOP/s\n")
    wrong = complaints(steps, about["tests"])
    print("\n".join(f"wrong: {line}" for line in wrong) or "nothing is wrong", flush=True)
    finish("gpu", {**vars(args), "model": Path(args.model).name, "dataset": Path(args.dataset).name} | about | figures)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
