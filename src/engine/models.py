"""The model and its tokenizer; whatever is wrong with them is said before training starts."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import utils as transformers_utils

from src.engine.lora import merged_state
from src.errors import UserError, one_line
from src.hub import hub_problem, local_path

log = logging.getLogger(__name__)
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Embedded = Mapping[str, Callable[[], Loaded]]

NO_CODE = {"trust_remote_code": False}  # unset, transformers asks on standard input whether to run a model's own
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Parameters from which a CPU takes a model in bf16; below, time goes into the starting of operations. In fp32 a step of
# GRPO takes 1.1, 1.5, 1.5 and 1.7 times as long at 0.34, 1.3, 3.2 and 17 million (Qwen2, 8 x 8 x 32, one thread, EPYC).
LEAST_FOR_BF16 = 1_000_000
MASKED_LAYERS = {"full_attention", "sliding_attention"}  # the kinds that there is a mask for

# For a base model: plain text that needs no token of its own.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% set heads = {'user': 'Question: ', 'assistant': 'Answer:\\n'} %}"
    "{% for message in messages %}{{ heads.get(message['role'], '') + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\\n' }}{% endif %}"
)


def choose_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """The type that a model of so many parameters works in; fp32 masters are kept either way. Says which and why.

    name: bf16, fp32, or auto: bf16 where the hardware has it and, on a CPU, the model is not too small to gain by it.
    """
    cpu = device.type == "cpu"
    if name != "auto":
        dtype, why = DTYPES[name], "as --dtype says"
    elif not (_cpu_has_bf16() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)):
        dtype, why = torch.float32, f"the {'processor' if cpu else 'card'} has no bf16 of its own"
    elif cpu and parameters < LEAST_FOR_BF16:
        dtype, why = torch.float32, f"{parameters / 1e6:.1f} million parameters are too few for bf16 to pay"
    else:
        dtype, why = torch.bfloat16, f"the {'processor' if cpu else 'card'} has it"
    log.info("dtype: %s, %s", dtype_name(dtype), why)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As the flag --dtype calls it."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16: AVX512-BF16, AMX, or Arm's."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def load_model(name: str, device: torch.device, dtype: str = "auto", embedded: Embedded | None = None) -> Loaded:
    """Load a causal language model and its tokenizer from a folder or the Hub; or make one of the embedded.

    dtype: auto, bf16 or fp32, as `choose_dtype` takes it. embedded: by name, what is made on the spot.

    Raises:
        UserError: it cannot be found, reached or read, or cannot be trained here.
    """
    transformers_utils.logging.disable_progress_bar()  # loading and saving take a moment, training takes hours
    embedded, folder = embedded or {}, local_path(name)
    offline = None if name in embedded or folder else hub_problem()
    try:
        if name in embedded:
            model, tokenizer = embedded[name]()
            working = choose_dtype(dtype, device, model.num_parameters())
            for param in model.parameters():  # no buffers: rotary frequencies stay fp32, as `from_pretrained` has them
                param.data = param.data.to(working)
        else:
            model, tokenizer = _load_pretrained(folder or name, offline is None, device, dtype)
        model = model.to(device).eval()  # no dropout, ever: sampler, learner and reference have to agree
        _check_model(model, tokenizer)
    except Exception as error:  # the loaders raise whatever a missing or damaged file makes of them
        if isinstance(error, torch.OutOfMemoryError):  # of a card
            raise
        reason = offline if offline and isinstance(error, OSError) else one_line(error)
        what = f"the {'folder' if folder else 'model'} '{name}' ({reason})"
        advice = "give --model a whole folder or Hub id, or try --preset tiny"
        raise UserError(f"Cannot load {what}: {advice}. Code that comes with a model is never run.") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        log.info("model: '%s' has no chat template: it is asked in plain text, 'Question: ... Answer:'", name)
    return model, tokenizer


def _load_pretrained(source: str | Path, online: bool, device: torch.device, dtype: str) -> Loaded:
    """From a path, or the Hub. Raises ValueError for what is no complete model that can be trained."""
    hub = NO_CODE | {"local_files_only": not online}
    if isinstance(source, Path) and {"config.json", "adapter_config.json"}.isdisjoint(p.name for p in source.glob("*")):
        form = "a model is a folder with a config.json: GGUF files are not supported, nor other formats"
        raise ValueError(form if source.exists() else "it is not there")
    if transformers_utils.find_adapter_config_file(source, local_files_only=not online):
        raise ValueError("it holds an adapter: merge that into its base model, as peft's merge_and_unload does")
    config, tokenizer = AutoConfig.from_pretrained(source, **hub), AutoTokenizer.from_pretrained(source, **hub)
    config._attn_implementation = "sdpa"  # it can name a kernel on the Hub, which is code
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized, so they cannot be trained: take the model they were made from")
    with torch.device("meta"):
        dtype = choose_dtype(dtype, device, AutoModelForCausalLM.from_config(config, **NO_CODE).num_parameters())
    hub |= {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = AutoModelForCausalLM.from_pretrained(source, **hub)
    left_out = report["unexpected_keys"]
    if missing := report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}:
        few = ", ".join(sorted(missing)[:3]) + (f"; instead there is {min(left_out)}" if left_out else "")
        raise ValueError(f"{len(missing)} of its weights are missing or of another size, such as {few}")
    if left_out:
        log.warning("model: %d weights have no place in it and are left out, such as %s", len(left_out), min(left_out))
    return model, tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary model folder of transformers 5, adapters merged in."""
    model.save_pretrained(folder, state_dict=merged_state(model))
    tokenizer.save_pretrained(folder)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends a completion: all of the generation config's, the tokenizer's, and the template's."""
    ids = model.generation_config.eos_token_id
    ids = [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id, *turn_tokens(tokenizer)[1]]
    return sorted({each for each in ids if type(each) is int and 0 <= each < len(tokenizer)})


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], set[int]]:
    """The special tokens that the chat template writes, and the token that ends a reply there, be it special or not."""
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # whatever it is, it is said where a prompt is rendered
        return set(), set()
    rest = text.rpartition("Yes.")[2].strip()
    whole, after = tokenizer([text, rest], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    ends = {i for i in after[:1] if i in added and rest.startswith(added[i].content)}  # else it is an unknown word
    return {i for i in whole if i in added and added[i].special}, ends


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token; where there is none the end token, since masks never look at it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a model that would fail, or silently learn something else, later on."""
    rows, words, config = model.get_input_embeddings().weight.shape[0], len(tokenizer), model.config.get_text_config()
    if words > rows:
        raise ValueError(f"its tokenizer has {words} tokens and the model knows {rows}: they do not belong together")
    if not tokenizer("1 + 1 = 2", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one
        raise ValueError("it has no tokenizer, or an empty one: put tokenizer.json beside the model")
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no end token, so no completion could end: set its eos_token")
    if odd := {*(getattr(config, "layer_types", None) or ())} - MASKED_LAYERS:
        raise ValueError(f"its layers of the kind {min(odd)} are not supported")
    if getattr(config, "alibi", False):
        raise ValueError("its scores depend on distances instead of positions (alibi), which is not supported")
    ids = torch.arange(8, device=model.device)[None] % rows
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
    if not logits.isfinite().all():
        raise ValueError("it answers with numbers that are not finite: its weights are damaged, get them anew")
    if not torch.allclose(logits.float(), plain.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(f"{type(model).__name__}, which changes its logits after the output layer, is not supported")


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens the model takes, prompt and completion together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62


def check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_completion_tokens: int) -> None:
    """Raise UserError when a prompt and its completion may be longer than the model takes."""
    longest, prompt = max_positions(model), max(map(len, prompts))
    if prompt + max_completion_tokens > longest:
        sizes = f"A question takes {prompt} tokens and --max_completion_tokens is {max_completion_tokens}"
        advice = "lower the latter, or leave such a question out (train.py: --max_prompt_tokens)"
        raise UserError(f"{sizes}, but the model takes {longest} tokens in all: {advice}.")


def fingerprint_model(model: PreTrainedModel) -> str:
    """A short hash of the model's weights, of the first thousand numbers of each: equal on every device."""
    starts = {name: w.detach().flatten()[:1000].bfloat16().float().cpu() for name, w in model.named_parameters()}
    return hashlib.sha256(b"".join(n.encode() + w.numpy().tobytes() for n, w in starts.items())).hexdigest()[:16]
