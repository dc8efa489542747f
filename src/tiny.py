"""The embedded preset: a word-level tokenizer and a tiny chat model for the problems of `src.problems`.

Nothing is downloaded and no GPU is needed.
"""

import re
from collections.abc import Callable

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from src.cells import split_answer
from src.problems import LARGEST, synthetic_rows
from src.rewards import TAGS

TINY_SYSTEM_PROMPT = """\
Solve the problem step by step. Reply in exactly this format: <reasoning>your steps</reasoning> <output>one sentence \
that states the result</output> <answer>the result as just the number, without words or units</answer>"""

END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"

# The system message is one token of the vocabulary: its full text in words would double the tiny model's work.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A word carries the space before it; a number never does, so that it is one embedding wherever it stands.
PIECES = re.compile(r" ?</?[a-z]+>| ?[A-Za-z]+|\d+|[^A-Za-z\d]")


def build_tiny_tokenizer() -> Qwen2Tokenizer:
    """Build a Qwen2 tokenizer that knows every word of the problems and the format as one token.

    Below the words lie the 256 bytes, so any text can be encoded. A turn ends with `<|im_end|>`; padding is
    `<|endoftext|>`, which is an end token too, as in Qwen and SmolLM2. The tags of the format are ordinary tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([END_OF_TEXT, *letters])}
    special = {"eos_token": END_OF_TURN, "pad_token": END_OF_TEXT, "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = Qwen2Tokenizer(vocabulary, **special, padding_side="left")
    rows = synthetic_rows("train", seed=0)  # so many that each word comes in each of its places, whatever the seed
    texts = [text for row in rows for text in (row["question"], split_answer(row["answer"], "gsm8k")[0])]
    words = {piece for text in texts for piece in PIECES.findall(text)} - set(" \n")
    words |= {"system", "user", "assistant", TINY_SYSTEM_PROMPT}
    words |= {*TAGS, *(f" {tag}" for tag in TAGS), *map(str, range(LARGEST + 1))}
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words, key=lambda w: (len(w), w))])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Build an untrained Qwen2 of 341,504 parameters; the global random state is left as it was."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 512}
    # The usual range of 0.02 is meant for wider models; with this one it learns in fewer steps.
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.04}
    ends = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    config = Qwen2Config(vocab_size=len(tokenizer), eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def embedded_models(seed: int) -> dict[str, Callable[[], tuple[Qwen2ForCausalLM, Qwen2Tokenizer]]]:
    """What makes each model that needs no file, by the name that --model calls it."""
    return {"tiny": lambda: make_tiny(seed)}


def make_tiny(seed: int) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """The untrained tiny model, whose weights depend on the seed, and its tokenizer, which does not."""
    tokenizer = build_tiny_tokenizer()
    return build_tiny_model(tokenizer, seed), tokenizer
