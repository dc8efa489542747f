"""TRL's GRPOTrainer and ours, both run for real on one rollout, agree up to the rounding of fp32.

Each trainer takes a copy of one tiny Qwen2, the same prompts, completions and rewards, and makes its optimizer steps:
TRL in `train()`, ours in `step()`. TRL runs prompt and completion together, every row by itself, in one batch; ours
runs each prompt once and its completions in micro-batches. They share nothing but PyTorch and the model's own layers.

The rollout has prompts and completions of uneven lengths, completions that were cut off, one that is a lone end token,
some that end with the padding token (an end token too), and a group of equal rewards. The policy is not the
reference, so the KL term has a gradient from the first update on.

TRL's `use_bias_correction_kl`, on by default since 1.16, is off: it multiplies the KL term by the probability ratio
(DeepSeek-V3.2), which changes its gradient even where the ratio is 1. Ours is DeepSeekMath's equation 3, without it.

`pytest -s tests/test_trl_parity.py` prints the largest differences.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

import src.grpo
from src.data import Example
from src.engine.kv_cache import left_pad
from src.engine.logprobs import Batch, accumulate_gradients, batch_logps
from src.engine.sampling import Completions, Sampler
from src.grpo import GRPOConfig, GRPOTrainer, group_advantages, grpo_loss, token_shares
from src.rollout import Rollout
from tests.helpers import gradients, plain_logps, random_texts, tiny_model, word_tokenizer
from tests.test_grpo import learn

trl = pytest.importorskip("trl", reason="TRL is what the results are compared with: see requirements-dev.txt")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LOSS_TYPES = get_args(GRPOConfig.__annotations__["loss_type"])
VOCABULARY, PAD, END = 64, 0, 2  # both PAD and END end a completion
GROUP_SIZE = 4
PROMPT_LENGTHS = [3, 7, 5, 2]
COMPLETION_LENGTHS = [1, 4, 8, 6, 2, 8, 8, 3, 7, 1, 3, 4, 5, 2, 6, 3]
CUT_OFF = [2, 5]  # row 6 is as long as these, and complete
ENDS_WITH_PAD = [1, 6, 8]
LONGEST = max(COMPLETION_LENGTHS)
REWARD_WEIGHTS = [0.5, 1.0, 0.25, 2.0]
LEARNING_RATE = 3e-3  # large, so that ratios leave the clipping range after one update

# Measured on an x86 CPU: the advantages differ by 2e-7, the rest as the table at the end says.
ADVANTAGES = 2e-6
# Of the loss. Its terms, advantages times ratios, are about 1 in size and cancel each other, so this is absolute.
LOSS = 2e-6
# Of each parameter's gradient, relative to its largest entry: fp32 rounds at 6e-8, and two layers of attention summed
# in another order make 5e-6 of that. From the second update on, the weights themselves differ by what WEIGHTS allows.
GRADIENT, LATER_GRADIENT = 1e-5, 1e-4
# Of each weight, in units of the learning rate, which is about what one Adam step moves it. Adam divides a gradient
# by its own size, so rounding weighs more the smaller the gradient is, and decides alone where that is near 0. Weights
# whose first gradient is below SMALL times their tensor's largest (3% of them) are therefore left out. One step then
# moves the others by the learning rate times the sign, exact up to fp32's rounding of weights near 1, 6e-8; in later
# steps, which depend on the gradients' ratios, an error is at most LATER_GRADIENT / SMALL of the rate, and far less
# where it is not the worst case.
SMALL, WEIGHTS, LATER_WEIGHTS = 1e-3, 1e-4, 5e-3

THEIR_NAMES = {
    "group_size": "num_generations",
    "max_completion_tokens": "max_completion_length",
    "temperature": "temperature",
    "learning_rate": "learning_rate",
    "max_grad_norm": "max_grad_norm",
    "kl_coef": "beta",
    "clip_eps": "epsilon",
    "clip_eps_high": "epsilon_high",
    "loss_type": "loss_type",
    "scale_advantages": "scale_rewards",
    "updates_per_rollout": "num_iterations",
    "mask_truncated": "mask_truncated_completions",
    "reward_weights": "reward_weights",
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "one update": {},
    "cut-off rows masked": {"mask_truncated": True},
    "raw advantages, no gradient clipping": {"scale_advantages": False, "max_grad_norm": 1e6},
    "room for longer completions": {"max_completion_tokens": 20},
    "kl": {"kl_coef": 0.1},
    "temperature": {"temperature": 0.7, "kl_coef": 0.05},
    "three updates": {"updates_per_rollout": 3},
    "three updates, higher upper clip": {"updates_per_rollout": 3, "clip_eps_high": 0.4},
    "everything": {
        "updates_per_rollout": 3,
        "clip_eps": 0.1,
        "clip_eps_high": 0.3,
        "kl_coef": 0.1,
        "temperature": 1.3,
        "mask_truncated": True,
        "scale_advantages": False,
        "max_completion_tokens": 12,
        "token_budget": 20,
    },
}


@dataclass(frozen=True)
class Models:
    policy: PreTrainedModel
    reference: PreTrainedModel
    older: PreTrainedModel  # a policy that may have sampled
    reference_dir: Path  # TRL reads its reference from disk


@dataclass(frozen=True)
class Data:
    """Prompts, their completions, group by group, and the scores (B, R) of those."""

    prompts: list[list[int]]
    completions: list[list[int]]
    scores: Tensor

    @property
    def truncated(self) -> Tensor:
        return torch.tensor([row[-1] not in (END, PAD) for row in self.completions])

    def rollout(self, width: int) -> Rollout:
        """As our trainer takes it, the completions padded to `width` columns."""
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in self.completions])  # (B, C)
        mask = torch.arange(width) < torch.tensor([len(row) for row in self.completions])[:, None]
        sampled = Completions(ids, mask, torch.zeros(ids.shape), self.truncated)
        batch = Batch(*left_pad(self.prompts, PAD, "cpu"), ids, mask)
        problems = [Example("", "", "", "")] * len(self.prompts)
        return Rollout(problems, batch, sampled, [""] * len(ids), self.scores, torch.zeros(len(ids)) > 0)


@dataclass(frozen=True)
class Run:
    """What one trainer made of the rollout; `losses` and `gradients` (before clipping) have one entry an update."""

    advantages: Tensor
    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Pair:
    loss_type: str
    ours: Run
    theirs: Run

    @property
    def updates(self) -> int:
        return len(self.theirs.losses)


@pytest.fixture(scope="module", autouse=True)
def quiet_and_offline() -> Iterator[None]:
    """No telemetry, no progress bars, no remarks on settings that are chosen on purpose."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def largest() -> Iterator[dict[tuple[str, str], float]]:
    """The largest difference so far by loss type and quantity; printed as a table at the end."""
    differences: dict[tuple[str, str], float] = defaultdict(float)
    yield differences
    columns = list(dict.fromkeys(quantity for _, quantity in sorted(differences)))
    print("\n\nlargest difference between TRL and ours\n" + "".join(f"{name:>24}" for name in ["", *columns]))
    for loss_type in LOSS_TYPES:
        print(f"{loss_type:>24}" + "".join(f"{differences[loss_type, column]:>24.1e}" for column in columns))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "eos_token_id": [END, PAD], "pad_token_id": PAD}
    reference = tiny_model("qwen2", seed=1, **sizes)
    reference_dir = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(reference_dir)
    return Models(nudged(reference, seed=2), reference, nudged(reference, seed=3), reference_dir)


def nudged(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy whose weights differ a little."""
    random, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=random))
    return model


def make_data() -> Data:
    completions = random_texts(COMPLETION_LENGTHS, seed=4, low=4, high=VOCABULARY)
    for i, row in enumerate(completions):
        if i not in CUT_OFF:
            row[-1] = PAD if i in ENDS_WITH_PAD else END
    scores = torch.rand(len(completions), len(REWARD_WEIGHTS), generator=torch.Generator().manual_seed(6))
    scores[-GROUP_SIZE:] = scores[-1]
    return Data(random_texts(PROMPT_LENGTHS, seed=5, low=4, high=VOCABULARY), completions, scores)


def make_config(loss_type: str, **settings: Any) -> GRPOConfig:
    fixed = {"group_size": GROUP_SIZE, "learning_rate": LEARNING_RATE, "reward_weights": REWARD_WEIGHTS}
    defaults = {"max_completion_tokens": LONGEST, "kl_coef": 0.0, "scale_advantages": True, "shaped_rewards": "always"}
    return GRPOConfig(**{**fixed, **defaults, "loss_type": loss_type, **settings})


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def our_run(models: Models, config: GRPOConfig, data: Data) -> Run:
    """`GRPOTrainer.step` on the rollout, watched at the loss and at the optimizer."""
    model = copy.deepcopy(models.reference)
    trainer = GRPOTrainer(model, word_tokenizer(), Sampler(model, [END, PAD], PAD), config)
    model.load_state_dict(models.policy.state_dict())
    masters, parts, losses, grads = trainer.optimizer.master, [], [], []
    real_loss, real_step = src.grpo.grpo_loss, trainer.optimizer.step

    def watched_loss(*args: Any, **kwargs: Any) -> Tensor:
        loss = real_loss(*args, **kwargs)
        parts.append(loss.item())
        return loss

    def watched_step(*args: Any) -> float | None:
        losses.append(sum(parts))
        parts.clear()
        grads.append({name: master.grad.clone() for name, master in masters.items() if master.grad is not None})
        return real_step(*args)

    rollout = data.rollout(config.max_completion_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(src.grpo, "grpo_loss", watched_loss)
        patch.setattr(trainer.optimizer, "step", watched_step)
        metrics = learn(trainer, rollout, config.learning_rate)
    advantages = group_advantages(
        rollout.scores @ torch.tensor(config.reward_weights), GROUP_SIZE, config.scale_advantages
    )
    return Run(advantages, losses, grads, weights_of(model), metrics)


def our_update(models: Models, config: GRPOConfig, data: Data, old_logps: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient, from the functions that a step is made of, for log-probabilities (B, C) given as old."""
    batch, losses = data.rollout(LONGEST).batch, []
    advantages = group_advantages(data.scores @ data.scores.new_tensor(config.reward_weights), GROUP_SIZE)
    weights = token_shares(batch.completion_mask, config.loss_type, config.max_completion_tokens)
    rows, model = torch.arange(len(advantages)), copy.deepcopy(models.policy)
    ref_logps = batch_logps(models.reference, batch, rows, config.temperature, config.token_budget)

    def loss(row: Tensor, column: Tensor, logps: Tensor) -> Tensor:
        old, ref, share = (values[row, column] for values in (old_logps, ref_logps, weights))
        clip = {"clip_eps": config.clip_eps, "clip_eps_high": config.clip_eps_high}
        losses.append(grpo_loss(logps, old, ref, advantages[row], share, kl_coef=config.kl_coef, **clip))
        return losses[-1]

    accumulate_gradients(model, batch, rows, loss, temperature=config.temperature, token_budget=config.token_budget)
    return sum(part.item() for part in losses), gradients(model)


def their_trainer(models: Models, config: GRPOConfig, data: Data, folder: Path, bf16: bool = False) -> Any:
    """TRL's trainer with our settings, which is given the completions by way of its `rollout_func`."""
    names = [str(q) for q in range(len(data.prompts))]  # stand for the prompts, which come as token ids

    def roll_out(repeated: list[str], _: Any) -> dict[str, Any]:
        assert repeated == [name for name in names for _ in range(GROUP_SIZE)]
        prompt_ids = [data.prompts[int(name)] for name in repeated]
        return {"prompt_ids": prompt_ids, "completion_ids": data.completions, "logprobs": None}

    def reward_function(values: list[float]) -> Callable[..., list[float]]:
        def reward(**_: Any) -> list[float]:
            return values

        return reward

    args = trl.GRPOConfig(
        **{theirs: getattr(config, ours) for ours, theirs in THEIR_NAMES.items()},
        use_bias_correction_kl=False,
        per_device_train_batch_size=len(data.completions),
        gradient_accumulation_steps=1,
        max_steps=config.updates_per_rollout,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=bf16,
        output_dir=str(folder),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    model = copy.deepcopy(models.policy)
    model.config._name_or_path = str(models.reference_dir)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[reward_function(column.tolist()) for column in data.scores.T],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": names}),
        processing_class=word_tokenizer(),
        rollout_func=roll_out,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def their_run(
    models: Models, config: GRPOConfig, data: Data, folder: Path, old_logps: Tensor | None = None, bf16: bool = False
) -> Run:
    """TRL's `train`, watched at the training step; `old_logps` (B, C) take the place of those that it computes."""
    trainer = their_trainer(models, config, data, folder, bf16)
    losses, grads = [], []
    real_step, real_rollout = trainer.training_step, trainer._generate_and_score_completions

    def watched_step(model: PreTrainedModel, *args: Any) -> Tensor:
        loss = real_step(model, *args)
        losses.append(loss.item())
        grads.append(gradients(model))
        return loss

    def rollout_with_old_logps(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return real_rollout(inputs) | ({} if old_logps is None else {"old_per_token_logps": old_logps})

    trainer.training_step, trainer._generate_and_score_completions = watched_step, rollout_with_old_logps
    trainer.train()
    logs = trainer.state.log_history[: config.updates_per_rollout]
    metrics = {
        "loss": losses[0],
        "kl": logs[0].get("kl", 0.0),
        "grad_norm": logs[0]["grad_norm"],
        "clip_fraction": sum(log["clip_ratio/region_mean"] for log in logs) / len(logs),
    }
    return Run(torch.tensor(trainer._logs["advantages"]), losses, grads, weights_of(trainer.model), metrics)


@pytest.fixture(
    scope="module",
    params=[(loss_type, name) for loss_type in LOSS_TYPES for name in SCENARIOS],
    ids=lambda param: ": ".join(param),
)
def pair(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    loss_type, scenario = request.param
    config, data = make_config(loss_type, **SCENARIOS[scenario]), make_data()
    theirs = their_run(models, config, data, tmp_path_factory.mktemp("trl"))
    return Pair(loss_type, our_run(models, config, data), theirs)


def error_of(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its own largest number."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items())


def test_the_advantages_are_those_of_trl(pair: Pair) -> None:
    torch.testing.assert_close(pair.ours.advantages, pair.theirs.advantages, rtol=ADVANTAGES, atol=ADVANTAGES)


def test_the_loss_of_every_update_is_that_of_trl(pair: Pair, largest: dict[tuple[str, str], float]) -> None:
    errors = [abs(ours - theirs) for ours, theirs in zip(pair.ours.losses, pair.theirs.losses, strict=True)]
    largest[pair.loss_type, "loss"] = max(largest[pair.loss_type, "loss"], *errors)
    assert max(errors) < LOSS


def test_every_gradient_of_every_update_is_that_of_trl(pair: Pair, largest: dict[tuple[str, str], float]) -> None:
    for update, both in enumerate(zip(pair.ours.gradients, pair.theirs.gradients, strict=True)):
        quantity, error = "gradient, later" if update else "gradient", error_of(*both)
        largest[pair.loss_type, quantity] = max(largest[pair.loss_type, quantity], error)
        assert error < (LATER_GRADIENT if update else GRADIENT), f"update {update}"


def test_the_weights_after_the_updates_are_those_of_trl(pair: Pair, largest: dict[tuple[str, str], float]) -> None:
    errors = []
    for name, theirs in pair.theirs.weights.items():
        gradient = pair.theirs.gradients[0][name].abs()
        errors.append((pair.ours.weights[name] - theirs).abs()[gradient > SMALL * gradient.max()] / LEARNING_RATE)
    error, quantity = float(torch.cat(errors).max()), "weights" if pair.updates == 1 else "weights, later"
    largest[pair.loss_type, quantity] = max(largest[pair.loss_type, quantity], error)
    assert len(torch.cat(errors)) > 0.95 * sum(weight.numel() for weight in pair.theirs.weights.values())
    assert error < (WEIGHTS if pair.updates == 1 else LATER_WEIGHTS)


def test_the_logged_numbers_are_those_of_trl(pair: Pair) -> None:
    ours = {name: pair.ours.metrics[name] for name in pair.theirs.metrics}
    assert ours == pytest.approx(pair.theirs.metrics, rel=1e-5, abs=LOSS)


def test_several_updates_leave_the_clipping_range(pair: Pair) -> None:
    """Else the updates above would not say anything about the clipping."""
    assert (pair.theirs.metrics["clip_fraction"] > 0.05) == (pair.updates > 1)


@pytest.mark.parametrize("clip_eps_high", [None, 0.5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_old_log_probabilities_that_are_given_count_as_in_trl(
    loss_type: str,
    clip_eps_high: float | None,
    models: Models,
    tmp_path: Path,
    largest: dict[tuple[str, str], float],
) -> None:
    """Off-policy from the first update on: another policy has sampled."""
    data = make_data()
    config = make_config(loss_type, clip_eps_high=clip_eps_high, kl_coef=0.05, temperature=0.8, token_budget=16)
    old_logps = torch.zeros(len(data.completions), LONGEST)
    with torch.no_grad():
        for i, completion in enumerate(data.completions):
            logps = plain_logps(models.older, data.prompts[i // GROUP_SIZE], completion, config.temperature)
            old_logps[i, : len(completion)] = logps
    theirs = their_run(models, config, data, tmp_path, old_logps)
    loss, gradient = our_update(models, config, data, old_logps)
    error = error_of(gradient, theirs.gradients[0])
    largest[loss_type, "gradient"] = max(largest[loss_type, "gradient"], error)
    assert theirs.metrics["clip_fraction"] > 0.05
    assert loss == pytest.approx(theirs.losses[0], abs=LOSS)
    assert error < GRADIENT


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("nothing", ["equal rewards", "all cut off"])
def test_a_step_with_nothing_to_learn_moves_no_weight_in_either(
    nothing: str, loss_type: str, models: Models, tmp_path: Path
) -> None:
    data = make_data()
    if nothing == "equal rewards":
        config = make_config(loss_type)
        data = Data(data.prompts, data.completions, torch.full_like(data.scores, 0.5))
    else:
        config = make_config(loss_type, mask_truncated=True, kl_coef=0.1)
        data = Data(data.prompts, [[*row[:-1], VOCABULARY - 1] for row in data.completions], data.scores)
    before = weights_of(models.policy)
    for run in (our_run(models, config, data), their_run(models, config, data, tmp_path)):
        assert all(torch.equal(run.weights[name], weight) for name, weight in before.items())
