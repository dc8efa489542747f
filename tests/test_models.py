"""Any causal language model: a GRPO step, save and load on each architecture; templates and tokenizers as they come."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    Lfm2Config,
    Lfm2ForCausalLM,
)

import src.engine.models
from src.data import SYSTEM_PROMPT, encode_prompts
from src.engine.models import (
    LEAST_FOR_BF16,
    check_room,
    choose_dtype,
    end_token_ids,
    load_model,
    pad_token_id,
    save_model,
)
from src.engine.sampling import Sampler, decode
from src.errors import UserError
from src.rewards import TAGS
from src.tiny import embedded_models
from tests.helpers import (
    ARCHITECTURES,
    VOCABULARY,
    WINDOW,
    assert_same,
    gradients,
    plain_sample,
    random_texts,
    tiny_model,
    word_tokenizer,
)
from tests.test_grpo import (
    END_IDS,
    EXAMPLES,
    GROUP,
    LONGEST,
    PROMPTS,
    TOTALS,
    PlainGRPO,
    learn,
    make_rollout,
    make_trainer,
    watch_updates,
)

SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MODELS = [
    *((kind, {}) for kind in ARCHITECTURES),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", SLIDING),
    ("qwen3", SLIDING | {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("gemma3_text", {"tie_word_embeddings": True}),
]
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    save_model(model, tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "settings"), MODELS, ids=str)
def test_sampling_a_step_saving_and_loading_agree_with_the_plain_ways(kind: str, settings: dict, tmp_path: Path):
    trainer = make_trainer(tiny_model(kind, **settings), kl_coef=0.3, temperature=0.7)
    rollout = make_rollout(trainer)
    uniforms = torch.rand(len(TOTALS), LONGEST, generator=torch.Generator().manual_seed(0)).tolist()
    for b, (ids, mask) in enumerate(zip(rollout.sampled.ids, rollout.sampled.mask, strict=True)):
        assert ids[mask].tolist() == plain_sample(trainer.model, PROMPTS[b // GROUP], uniforms[b], 0.7, END_IDS)
    PlainGRPO(trainer, rollout, TOTALS).backward()
    expected, seen = gradients(trainer.model), watch_updates(trainer)
    learn(trainer, rollout, 1e-3)
    assert_same(seen[0], expected)
    save_model(trainer.model, word_tokenizer(), tmp_path / "final")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, trainer.model(IDS).logits)


@pytest.mark.parametrize("pad", ["<end>", None])
def test_a_template_without_a_system_role_and_padding_that_is_the_end_token_or_missing_train(pad: str | None):
    trainer = make_trainer(learning_rate=1e-3, kl_coef=0.3)
    tokenizer = trainer.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start>{{ m['content'] }}{% endfor %}<start>"
    )
    tokenizer.pad_token = pad
    trainer.sampler.pad_id = pad_token_id(tokenizer)
    assert trainer.sampler.pad_id == tokenizer.eos_token_id
    [prompt] = encode_prompts(tokenizer, ["Tom has 3."])
    assert tokenizer.decode(prompt).count(SYSTEM_PROMPT) == 1
    metrics, rollout = trainer.step(0, EXAMPLES)
    assert metrics["logp_gap"] < 1e-4 and rollout.batch.completion_mask.sum(-1).min() >= 1


class TestDtype:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch):
        """Lets the processor have these capabilities, and the card bf16 in hardware or only emulated."""

        def be(*capabilities: str, card: bool = True) -> None:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
            supported = lambda including_emulation=True: including_emulation or card  # noqa: E731
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

        return be

    @pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16", "bf16"])
    def test_a_cpu_with_bf16_takes_all_but_small_models_in_it(self, has: str, machine, caplog):
        machine("neon", has)
        cpu = torch.device("cpu")
        with caplog.at_level(logging.INFO, "src.engine.models"):
            assert choose_dtype("auto", cpu, LEAST_FOR_BF16) == torch.bfloat16
            assert choose_dtype("auto", cpu, LEAST_FOR_BF16 - 1) == torch.float32
        assert [record.message for record in caplog.records] == [
            "dtype: bf16, the processor has it",
            "dtype: fp32, 1.0 million parameters are too few for bf16 to pay",
        ]

    def test_a_cpu_without_it_and_a_card_that_emulates_it_stay_in_fp32_which_is_said_once(self, machine, caplog):
        machine("avx512_f", "avx512_vnni", card=False)
        with caplog.at_level(logging.INFO, "src.engine.models"):
            assert choose_dtype("auto", torch.device("cpu"), 10**9) == torch.float32
            assert choose_dtype("auto", torch.device("cuda"), 10**9) == torch.float32
        assert [record.message for record in caplog.records] == [
            "dtype: fp32, the processor has no bf16 of its own",
            "dtype: fp32, the card has no bf16 of its own",
        ]

    def test_a_card_that_has_it_takes_every_model_in_bf16(self, machine):
        machine()
        assert choose_dtype("auto", torch.device("cuda"), 10) == torch.bfloat16

    @pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
    def test_a_type_asked_for_is_loaded_and_saved_with_the_model(self, name, dtype, machine, tmp_path: Path):
        machine(*(["avx512_bf16"] if name == "fp32" else []))
        save(tiny_model(), word_tokenizer(), tmp_path / "made")
        model, tokenizer = load_model(str(tmp_path / "made"), torch.device("cpu"), dtype=name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        config = json.loads(Path(save(model, tokenizer, tmp_path / "again"), "config.json").read_text(encoding="utf-8"))
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        again, _ = load_model(str(tmp_path / "again"), torch.device("cpu"), dtype=name)
        assert_same(again.state_dict(), model.state_dict(), tolerance=0)

    def test_an_embedded_model_computes_in_bf16_what_its_checkpoint_does(self, tmp_path: Path):
        model, tokenizer = load_model("tiny", torch.device("cpu"), "bf16", embedded_models(0))
        again, _ = load_model(save(model, tokenizer, tmp_path), torch.device("cpu"), "bf16")
        ids = torch.arange(300)[None] % len(tokenizer)
        assert model.dtype == again.dtype == torch.bfloat16
        assert torch.equal(model(ids).logits, again(ids).logits)  # rotary frequencies are fp32 in both

    def test_a_type_chosen_for_a_folder_goes_by_its_size(self, machine, tmp_path, monkeypatch):
        machine("avx512_bf16")
        folder = save(tiny_model(), word_tokenizer(), tmp_path)
        numbers = tiny_model().num_parameters()
        for least, dtype in ((numbers, torch.bfloat16), (numbers + 1, torch.float32)):
            monkeypatch.setattr(src.engine.models, "LEAST_FOR_BF16", least)
            assert load_model(folder, torch.device("cpu"))[0].dtype == dtype


class TestFolders:
    """A folder that would train something else than its name says is refused in one line that says why."""

    def refusal(self, folder: Path) -> str:
        with pytest.raises(
            UserError, match=r"^Cannot load the (folder|model) '.*' \(.*\): give --model a [^\n]*$"
        ) as caught:
            load_model(str(folder), torch.device("cpu"))
        return str(caught.value).partition("' (")[2].rpartition("): give")[0]

    def folder(self, folder: Path, change: Any = None, config: dict | None = None, **settings: Any) -> Path:
        """A saved model whose weights were changed by `change` and whose configuration says `config`."""
        save(tiny_model(**settings), word_tokenizer(), folder)
        if change:
            save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")) | (config or {})
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
        return folder

    def test_layers_of_a_kind_that_has_no_mask_here(self, tmp_path: Path):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
        tokenizer = word_tokenizer()
        save(Lfm2ForCausalLM(Lfm2Config(vocab_size=len(tokenizer), **sizes, **kinds)), tokenizer, tmp_path)
        assert self.refusal(tmp_path) == "its layers of the kind conv are not supported"

    def test_scores_that_depend_on_distances_instead_of_positions(self, tmp_path: Path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        for alibi in (False, True):
            config = FalconConfig(vocab_size=VOCABULARY, alibi=alibi, **sizes)
            save(FalconForCausalLM(config), word_tokenizer(), tmp_path)
            if not alibi:
                load_model(str(tmp_path), torch.device("cpu"))  # rotary embeddings instead
        assert "(alibi), which is not supported" in self.refusal(tmp_path)
        for kind in ("bloom", "mpt"):  # have that alone, and none of the attention that takes a mask of scores
            config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
            save(AutoModelForCausalLM.from_config(config), word_tokenizer(), tmp_path / kind)
            assert "does not support an attention implementation" in self.refusal(tmp_path / kind)

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
    def test_names_with_the_prefix_of_a_wrapper(self, prefix: str, tmp_path: Path):
        folder = self.folder(tmp_path, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
        why = self.refusal(folder)
        lost = "lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight"
        lost = f"21 of its weights are missing or of another size, such as {lost}"  # 2 layers of 9, and 3
        assert why == f"{lost}; instead there is {prefix}model.embed_tokens.weight"

    @pytest.mark.parametrize(
        ("gone", "named"),
        [
            ("lm_head", "lm_head.weight"),
            ("layers.1.mlp.up", "model.layers.1.mlp.up_proj.weight"),
            ("model.norm", "model.norm.weight"),
            ("layers.1", "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight"),
        ],
    )
    def test_weights_that_are_gone(self, gone: str, named: str, tmp_path: Path):
        keep = lambda weights: {n: t for n, t in weights.items() if gone not in n}  # noqa: E731
        why = self.refusal(self.folder(tmp_path, keep, tie_word_embeddings=False))
        assert re.match(rf"\d of its weights are missing or of another size, such as {named}", why)

    def test_weights_of_another_size(self, tmp_path: Path):
        assert "another size, such as lm_head.weight, model.embed_tokens.weight" in self.refusal(
            self.folder(tmp_path, config={"vocab_size": VOCABULARY + 3}, tie_word_embeddings=False)
        )

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_tied_head_and_a_whole_model_are_no_fault(self, tied: bool, tmp_path: Path, caplog):
        folder = self.folder(tmp_path, tie_word_embeddings=tied)
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
        model, _ = load_model(str(folder), torch.device("cpu"))
        assert_same(model.state_dict(), tiny_model(tie_word_embeddings=tied).state_dict(), tolerance=0)
        assert "left out" not in caplog.text

    def test_weights_that_have_no_place_are_said_and_left_out(self, tmp_path: Path, caplog):
        load_model(str(self.folder(tmp_path, config={"num_hidden_layers": 1})), torch.device("cpu"))
        assert "model: 9 weights have no place in it and are left out, such as model.layers.1.input" in caplog.text

    def test_an_adapter(self, tmp_path: Path):
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(self.folder(tmp_path / "base"))
        adapter = tmp_path / "adapter"
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
        word_tokenizer().save_pretrained(adapter)
        assert self.refusal(adapter).startswith("it holds an adapter: merge that into its base model")

    def test_formats_that_are_not_supported(self, tmp_path: Path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        for path in (tmp_path, tmp_path / "model.gguf"):
            assert (
                self.refusal(path)
                == "a model is a folder with a config.json: GGUF files are not supported, nor other formats"
            )
        quantized = self.folder(tmp_path / "q", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
        assert self.refusal(quantized).startswith("its weights are quantized, so they cannot be trained")

    def test_a_full_memory_is_not_blamed_on_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

        monkeypatch.setattr("src.engine.models._check_model", full)
        with pytest.raises(torch.OutOfMemoryError):
            load_model(str(self.folder(tmp_path)), torch.device("cpu"))

    def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        assert "contains custom code" in self.refusal(self.folder(tmp_path, config=code))


class TestTurns:
    CHATML = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def tokenizer(self, special: bool, template: str = CHATML) -> Any:
        """`<end>` is its end token, which no turn of the template ends with; the tags are special tokens."""
        made = word_tokenizer()
        made.add_special_tokens({"additional_special_tokens": ["<start>", "<|im_start|>", *TAGS]})
        made.add_tokens(["<|im_end|>"], special_tokens=special)
        made.chat_template = template
        return made

    @pytest.mark.parametrize("special", [True, False])
    def test_the_token_that_ends_a_turn_in_the_template_ends_a_completion_too(self, special: bool):
        made = self.tokenizer(special)
        end, turn_end = made.convert_tokens_to_ids(["<end>", "<|im_end|>"])
        model = tiny_model(eos_token_id=[5, 6])
        assert end_token_ids(model, made) == [end, 5, 6, turn_end]

    @pytest.mark.parametrize(
        "template",
        [
            CHATML.replace("<|im_end|>", ""),
            "{{ nosuch.thing }}",
            CHATML.replace("<|im_end|>", "# <|im_end|>"),
            "{% for m in messages %}{{ m['content'] }}{{ eos_token }}<|im_end|>{% endfor %}",
        ],
    )
    def test_nothing_but_the_first_token_after_a_reply_does(self, template: str):
        model = tiny_model(eos_token_id=None)
        assert end_token_ids(model, self.tokenizer(True, template)) == [word_tokenizer().eos_token_id]

    @pytest.mark.parametrize("special", [True, False])
    def test_tags_that_are_special_tokens_stay_in_the_text_and_the_tokens_of_a_turn_vanish(self, special: bool):
        made = self.tokenizer(special)
        text = "<reasoning>1 + 2</reasoning> <output>3</output> <answer>3</answer>"
        assert set(made.convert_tokens_to_ids(TAGS)) < set(made.all_special_ids)
        rows = made([f"{text}{end}" for end in ("<end>", "<|im_end|>", "<pad>", "<|im_start|>", "")])["input_ids"]
        assert decode(made, [*rows, []]) == [text] * 5 + [""]


def test_a_prompt_and_its_completion_have_to_fit_into_the_positions():
    model, prompts = tiny_model(max_position_embeddings=20), [[1] * 4, [1] * 12]
    check_room(model, prompts, 8)
    with pytest.raises(UserError, match=r"^A question takes 12 tokens and --max_completion_tokens is 9, but .* 20 "):
        check_room(model, prompts, 9)
    endless = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))  # ALiBi and its like
    check_room(endless, prompts, 10**9)


def test_learned_positions_may_be_used_to_the_last(gpu):
    """The GPU computes on for rows that have ended or wait; a table of positions has no row for what follows."""
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCABULARY, n_positions=130, n_embd=32, n_layer=1, n_head=4), dtype=torch.float32
    ).to("cuda")
    prompts, ends = random_texts([5, 120, 60], 1), list(range(3, 30))
    done = Sampler(model.eval(), ends, 0, rows=4).generate(prompts, group_size=2, max_new_tokens=10)
    for b, (ids, mask) in enumerate(zip(done.ids.cpu(), done.mask.cpu(), strict=True)):
        assert ids[mask].tolist() == plain_sample(model, prompts[b // 2], [0.0] * 10, 0, ends)


class TestBaseModels:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = None
        return save(tiny_model(), tokenizer, tmp_path / "base")

    def test_one_without_a_template_is_asked_in_plain_text_which_is_said_once(self, folder: str, caplog):
        with caplog.at_level(logging.INFO, "src.engine.models"):
            _, tokenizer = load_model(folder, torch.device("cpu"))
        assert [record.message for record in caplog.records if record.message.startswith("model:")] == [
            f"model: '{folder}' has no chat template: it is asked in plain text, 'Question: ... Answer:'"
        ]
        messages = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "How many now?"},
        ]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == ("Be short.\n\nQuestion: How many?\n\nAnswer:\n3<end>\n\nQuestion: How many now?\n\nAnswer:\n")
        tokenizer.bos_token = "<start>"
        assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == "<start>Be short.\n\n"

    def test_its_checkpoint_carries_the_template_and_a_chat_model_keeps_its_own(
        self, folder: str, tmp_path: Path, caplog
    ):
        model, tokenizer = load_model(folder, torch.device("cpu"))
        caplog.clear()
        with caplog.at_level(logging.INFO, "src.engine.models"):
            _, again = load_model(save(model, tokenizer, tmp_path / "trained"), torch.device("cpu"))
            _, chat = load_model(save(model, word_tokenizer(), tmp_path / "chat"), torch.device("cpu"))
        assert encode_prompts(again, ["How many?"]) == encode_prompts(tokenizer, ["How many?"])
        assert chat.chat_template == word_tokenizer().chat_template
        assert "template" not in caplog.text


def test_a_saved_tokenizer_is_the_same_again(tmp_path: Path):
    tokenizer = word_tokenizer()
    save(tiny_model(), tokenizer, tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "<start>Tom has 3 apples<end><pad>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.all_special_ids == tokenizer.all_special_ids
