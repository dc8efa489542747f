"""Time of one decoding step (one token for every row), ours and transformers' in turns, on the same prompts.

    python benchmarks/bench_decode.py --model DIR --dataset PATH --rows 1 8 64 256 --tokens 64

Time is that of `--tokens` tokens less that of one token, so prefill, which ours does once a group, is left out. The
floor is the time that reading the weights and the keys and values once takes, at the bandwidth measured beforehand.
`generate_batch` runs on CUDA only: on a CPU a call of 9 tokens took more than a minute.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    CPU_TIME,
    SHAPES,
    count_cpu_time,
    describe,
    endless_sampler,
    finish,
    model_folder,
    synchronize,
    table,
)
from src.data import encode_prompts, load_examples
from src.engine.kv_cache import left_pad
from src.engine.models import load_model, pad_token_id
from src.engine.processes import Processes

Decode = Callable[[int], object]  # tokens -> decodes so many for every row


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a plain read of `size` bytes reaches, the best of ten."""
    data, best = torch.ones(size // 4, device=device), 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        best = max(best, size / (time.perf_counter() - start))
    return best


def step_bytes(model: PreTrainedModel, rows: int, columns: int) -> int:
    """Bytes that a step reads: every weight but the input embedding (unless it is the head too), and the cache."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if head is not embedding:
        weights -= embedding.numel() * embedding.element_size()
    c = model.config.get_text_config()
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    keys_and_values = 2 * c.num_hidden_layers * c.num_key_value_heads * size * embedding.element_size()
    return weights + rows * columns * keys_and_values


def ways(model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], group: int) -> dict[str, Decode]:
    """Each way to decode a group of completions for every prompt, sampled at temperature 1."""
    rows, pad = len(prompts) * group, pad_token_id(tokenizer)
    sampler = endless_sampler(model, tokenizer, rows)
    repeated = [prompt for prompt in prompts for _ in range(group)]
    ids, mask = left_pad(repeated, pad, model.device)

    def config(tokens: int, **more: Any) -> GenerationConfig:
        ends = {"eos_token_id": None, "pad_token_id": pad, "max_new_tokens": tokens}
        return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends, **more)

    def ours(tokens: int) -> object:
        return sampler.generate(
            prompts,
            group_size=group,
            max_new_tokens=tokens,
            temperature=1.0,
            uniforms=torch.rand(rows, tokens),
        )

    def generate(tokens: int, **more: Any) -> object:
        return model.generate(ids, attention_mask=mask.long(), generation_config=config(tokens, **more))

    def generate_batch(tokens: int) -> object:
        return model.generate_batch(inputs=repeated, generation_config=config(tokens), progress_bar=False)

    found: dict[str, Decode] = {"ours": ours, "generate, dynamic cache": generate}
    found["generate, static cache, compiled"] = lambda tokens: generate(tokens, cache_implementation="static")
    return found | ({"generate_batch": generate_batch} if model.device.type == "cuda" else {})


def time_in_turns(
    decoders: dict[str, Decode], tokens: int, repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a token of each way, measured in turns after a warm-up; and why those that fail do."""
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for turn in range(repeats + 1):
        for name, decode in decoders.items():
            if name in failed:
                continue
            try:
                times = [_seconds(decode, count, device) for count in (1, tokens)]
            except Exception as error:  # whatever a way that is not for this device raises
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                continue
            if turn:
                seconds.setdefault(name, []).append((times[1] - times[0]) / (tokens - 1))
    return seconds, failed


def _seconds(decode: Decode, tokens: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    decode(tokens)
    synchronize(device)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, device: torch.device, rows: Sequence[int]) -> dict[str, Any]:
    """All ways at every number of rows; prints the table, returns the figures."""
    model, tokenizer = load_model(model_folder(args.model, args.shape, device), device)
    questions = [example.question for example in load_examples(args.dataset, "train")[0][: max(rows)]]
    speed, table_rows, figures = bandwidth(device, args.bandwidth_mb * 2**20), [], {}
    for count in rows:
        group = min(count, 8)
        prompts = encode_prompts(tokenizer, questions[: count // group])
        floor = step_bytes(model, count, max(map(len, prompts)) + args.tokens // 2) / speed
        seconds, failed = time_in_turns(ways(model, tokenizer, prompts, group), args.tokens, args.repeats, device)
        for name, times in seconds.items():
            middle = statistics.median(times)
            ratio = statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True))
            shown = [f"{1000 * middle:.2f}", f"{ratio:.2f}", f"{count / middle:.0f}", f"{100 * floor / middle:.0f}%"]
            table_rows.append([count, name, *shown])
            figures[f"{count} rows, {name}"] = {
                "seconds": middle,
                "ratio_to_ours": ratio,
                "floor_share": floor / middle,
            }
        for name, reason in failed.items():
            table_rows.append([count, name, f"not run here ({reason})", "", "", ""])
    print(f"memory bandwidth {speed / 1e9:.1f} GB/s\n")
    print(table(["rows", "", "ms a step", "times ours", "tokens/s", "share of the floor"], table_rows))
    return {"bandwidth": speed, "figures": figures}


def main() -> None:
    """Measure as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="model folder, Hub id, or tiny")
    parser.add_argument("--shape", default="pretrained", choices=["pretrained", *SHAPES], help="random weights instead")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="8 or less, or a multiple of 8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, after one warm-up")
    parser.add_argument("--bandwidth_mb", type=int, default=1024, help="size of the buffer that is read for the floor")
    parser.add_argument("--device")
    parser.add_argument("--cpu_time", action="store_true", help=CPU_TIME)
    args = parser.parse_args()
    if args.cpu_time:
        count_cpu_time()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = Processes().choose_device(args.device)
    result = measure(args, device, args.rows)
    names = {"model": Path(args.model).name, "dataset": Path(args.dataset).name}
    finish("decode", {**vars(args), **names} | describe(device) | result)


if __name__ == "__main__":
    main()
