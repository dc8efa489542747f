"""AdamW on fp32 masters: equal to PyTorch's in fp32; in bf16, small updates arrive and gradients add up exactly."""

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from src.engine import optim
from src.engine.optim import MasterAdamW
from tests.pretend_gpu import PretendGPU

WIDTH = 16
DTYPES = [torch.float32, torch.bfloat16]


def network(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> nn.Sequential:
    """Weights as large as those of a pretrained model, with gains of one as in its norms."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.normal_(0, 0.02, generator=random)
            layer.bias.normal_(0, 0.02, generator=random)
    return model.to(device, dtype)


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """Add a gradient that is a function of weights and step."""
    weight = next(model.parameters())
    inputs = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(step)).to(weight)
    (scale * (model(inputs) - inputs).float().square().mean()).backward()


def run_adam(model: nn.Module, optimizer: MasterAdamW, steps: Iterable[int], lr: float = 1e-2) -> list[float | None]:
    norms = []
    for step in steps:
        backward(model, step)
        norms.append(optimizer.step(lr, max_grad_norm=0.5))
    return norms


def run_torch_adam(model: nn.Module, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def values(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def changed_share(now: Iterable[Tensor], before: Iterable[Tensor]) -> float:
    return float((values(now) != values(before)).float().mean())


def snapshot(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}


def assert_equal_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


class TestSinglePrecision:
    def test_it_is_pytorch_s_adamw_after_clipping(self, device: str):
        mine, theirs = network(device=device), network(device=device)
        optimizer = MasterAdamW(mine)
        reference = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0)
        for step, lr in enumerate([1e-3, 2e-3, 5e-3, 5e-3, 5e-3]):
            for model in (mine, theirs):
                backward(model, step)
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            reference.param_groups[0]["lr"] = lr
            reference.step()
            reference.zero_grad()
            assert optimizer.step(lr, 0.5) == pytest.approx(float(norm))
        torch.testing.assert_close(values(mine.parameters()), values(theirs.parameters()), atol=1e-6, rtol=0)

    def test_one_step_by_hand(self):
        # The first step of Adam goes by the learning rate against the sign of the gradient; no weight decay.
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[5.0, -5.0]]))
        optimizer = MasterAdamW(model)
        (model.weight * torch.tensor([[3.0, -4.0]])).sum().backward()
        assert optimizer.step(0.1, 100.0) == pytest.approx(5.0)
        torch.testing.assert_close(model.weight.detach(), torch.tensor([[4.9, -4.9]]))

    @pytest.mark.parametrize(("limit", "norm"), [(100.0, 5.0), (1.0, 1.0), (0.5, 0.5)])
    def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it(self, limit: float, norm: float):
        model = nn.Linear(2, 1, bias=False)
        optimizer = MasterAdamW(model)
        (model.weight * torch.tensor([[3.0, -4.0]])).sum().backward()
        assert optimizer.step(0.1, limit) == pytest.approx(5.0)  # the norm before clipping
        first_moment = snapshot(optimizer)["adam/exp_avg/weight"]  # a tenth of the gradient after one step
        assert float(first_moment.norm()) * 10 == pytest.approx(norm, rel=1e-4)

    def test_the_masters_are_the_weights_themselves(self):
        model = network()
        masters = MasterAdamW(model).master
        assert all(masters[name] is param for name, param in model.named_parameters())

    def test_a_frozen_weight_is_left_alone(self):
        model = network()
        model[0].weight.requires_grad_(False)
        before = model[0].weight.clone()
        optimizer = MasterAdamW(model)
        run_adam(model, optimizer, range(2))
        assert torch.equal(model[0].weight, before) and "0.weight" not in optimizer.master


class TestHalfPrecision:
    def test_small_updates_arrive_which_bf16_weights_alone_would_lose(self, device: str):
        half, lr, steps = network(torch.bfloat16, device), 1e-6, 10
        single, pure = copy.deepcopy(half).float(), copy.deepcopy(half)
        start = [p.detach().float() for p in half.parameters()]
        optimizer = MasterAdamW(half)
        run_adam(half, optimizer, range(steps), lr)
        run_torch_adam(single, steps, lr)
        run_torch_adam(pure, steps, lr)
        arrived = changed_share(single.parameters(), start)
        assert arrived > 0.95
        assert changed_share(optimizer.master.values(), start) == pytest.approx(arrived, abs=0.02)
        assert changed_share(pure.float().parameters(), start) < 0.1 * arrived
        distance = values(single.parameters()) - values(start)
        assert (values(optimizer.master.values()) - values(start) - distance).norm() < 0.2 * distance.norm()

    def test_the_weights_are_the_rounded_masters(self):
        model = network(torch.bfloat16)
        optimizer = MasterAdamW(model)
        before = values(model.parameters()).clone()
        run_adam(model, optimizer, range(3))
        assert not torch.equal(values(model.parameters()), before)
        for name, param in model.named_parameters():
            assert optimizer.master[name].dtype == torch.float32 and param.dtype == torch.bfloat16
            assert torch.equal(param, optimizer.master[name].bfloat16())

    def test_a_step_waits_for_the_device_once(self, gpu: PretendGPU | None):
        if gpu is None:
            pytest.skip("only the stand-in counts")
        model = network(torch.bfloat16).cuda()
        optimizer = MasterAdamW(model)
        for _ in range(2):
            model(torch.ones(3, WIDTH, device="cuda", dtype=torch.bfloat16)).sum().backward()
            before = gpu.waits
            assert optimizer.step(1e-3, 1.0) > 0
        # And once on the stand-in alone, where PyTorch brings the factor of the clip to where gradients really are.
        assert gpu.waits == before + 2

    def test_gradients_of_micro_batches_add_up_in_single_precision(self, device: str):
        model = nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
        optimizer = MasterAdamW(model)
        small = float(torch.tensor(0.001).bfloat16())  # 1 + small is 1 in bf16, however often it is added
        for scale in [1.0] + [small] * 20:
            (model.weight * scale).sum().backward()
            assert model.weight.grad is None
        assert float(optimizer.master["weight"].grad) == pytest.approx(1 + 20 * small, rel=1e-6)
        assert optimizer.step(0.1, 1.0) == pytest.approx(1 + 20 * small, rel=1e-6)

    def test_a_closed_optimizer_no_longer_takes_the_gradients(self):
        model = network(torch.bfloat16)
        first = MasterAdamW(model)
        first.close()
        second = MasterAdamW(model)
        backward(model, 0)
        assert first.step(0.1, 1.0) is None
        assert second.step(0.1, 1.0) > 0


@pytest.mark.parametrize("dtype", DTYPES)
class TestBothPrecisions:
    def test_weights_stay_at_their_addresses(self, dtype: torch.dtype):
        model = network(dtype)
        addresses = [p.data_ptr() for p in model.parameters()]
        optimizer = MasterAdamW(model)
        run_adam(model, optimizer, range(2))
        optimizer.load_state_tensors(snapshot(optimizer))
        assert [p.data_ptr() for p in model.parameters()] == addresses

    def test_without_any_gradient_nothing_moves(self, dtype: torch.dtype):
        model = network(dtype)
        optimizer = MasterAdamW(model)
        run_adam(model, optimizer, range(2))
        before = snapshot(optimizer)
        assert optimizer.step(0.1, 1.0) is None
        assert_equal_state(snapshot(optimizer), before)

    def test_gradients_are_forgotten_after_a_step_and_on_request(self, dtype: torch.dtype):
        model = network(dtype)
        optimizer = MasterAdamW(model)
        run_adam(model, optimizer, range(1))
        assert optimizer.step(0.1, 1.0) is None
        backward(model, 1)
        optimizer.zero_grad()
        assert optimizer.step(0.1, 1.0) is None

    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
    def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten(self, scale: float, dtype: torch.dtype):
        model, twin = network(dtype), network(dtype)
        optimizer, unharmed = MasterAdamW(model), MasterAdamW(twin)
        run_adam(model, optimizer, range(2))
        before, weights = snapshot(optimizer), values(model.parameters()).clone()
        backward(model, 2)
        hook = model[2].bias.register_hook(lambda grad: grad * scale)
        backward(model, 2)
        assert not math.isfinite(optimizer.step(0.1, 1.0))
        assert_equal_state(snapshot(optimizer), before)
        assert torch.equal(values(model.parameters()), weights)
        hook.remove()
        run_adam(model, optimizer, range(2, 4))
        run_adam(twin, unharmed, range(4))
        assert_equal_state(snapshot(optimizer), snapshot(unharmed))

    def test_a_loaded_state_goes_on_to_the_bit(self, dtype: torch.dtype):
        straight, stopped, resumed = network(dtype), network(dtype), network(dtype, seed=1)
        optimizer = MasterAdamW(straight)
        run_adam(straight, optimizer, range(6))
        first = MasterAdamW(stopped)
        run_adam(stopped, first, range(3))
        second = MasterAdamW(resumed)
        second.load_state_tensors(snapshot(first))
        assert torch.equal(values(resumed.parameters()), values(stopped.parameters()))
        run_adam(resumed, second, range(3, 6))
        assert_equal_state(snapshot(second), snapshot(optimizer))
        assert torch.equal(values(resumed.parameters()), values(straight.parameters()))

    def test_a_state_loaded_stays_the_loader_s_own(self, dtype: torch.dtype):
        model, other = network(dtype), network(dtype)
        optimizer, second = MasterAdamW(model), MasterAdamW(other)
        run_adam(model, optimizer, range(2))
        state = snapshot(optimizer)
        second.load_state_tensors(state)
        run_adam(other, second, range(2, 4))
        assert_equal_state(state, snapshot(optimizer))

    def test_the_state_names_masters_and_moments_by_parameter(self, dtype: torch.dtype):
        model = network(dtype)
        optimizer = MasterAdamW(model)
        names = [name for name, _ in model.named_parameters()]
        assert set(snapshot(optimizer)) == {f"master/{name}" for name in names}
        run_adam(model, optimizer, range(1))
        keys = ("master", "adam/step", "adam/exp_avg", "adam/exp_avg_sq")
        assert set(snapshot(optimizer)) == {f"{key}/{name}" for key in keys for name in names}
        assert all(tensor.dtype == torch.float32 for tensor in snapshot(optimizer).values())

    def test_a_state_without_one_of_the_parameters_is_refused(self, dtype: torch.dtype):
        optimizer = MasterAdamW(network(dtype))
        state = snapshot(optimizer)
        del state["master/2.weight"]
        with pytest.raises(KeyError, match=r"master/2\.weight"):
            optimizer.load_state_tensors(state)


@pytest.mark.parametrize(("saved", "loaded"), [DTYPES, DTYPES[::-1]])
def test_a_state_loads_in_the_precision_and_on_the_device_of_the_loader(device: str, saved, loaded):
    """A run moved from a GPU, where the model is in half precision, to a CPU, where it is not; and back."""
    places = (device, "cpu") if saved == torch.bfloat16 else ("cpu", device)
    first, second = network(saved, places[0]), network(loaded, places[1], seed=1)
    optimizer, other = MasterAdamW(first), MasterAdamW(second)
    run_adam(first, optimizer, range(3))
    state = {name: tensor.cpu() for name, tensor in snapshot(optimizer).items()}
    other.load_state_tensors(state)
    assert_equal_state({name: tensor.cpu() for name, tensor in snapshot(other).items()}, state)
    rounded = torch.cat([state[f"master/{name}"].flatten() for name, _ in first.named_parameters()]).to(loaded)
    assert torch.equal(values(second.parameters()).cpu(), rounded)
    norms = run_adam(second, other, range(3, 5))
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert changed_share(values(second.parameters()).cpu(), rounded) > 0.5


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 4)])
def test_a_gradient_added_up_in_pieces_is_the_one_added_at_one_go(shape: tuple[int, ...], monkeypatch):
    monkeypatch.setattr(optim, "PIECE", 6)
    random = torch.Generator().manual_seed(0)
    total, other = torch.randn(shape, generator=random), torch.randn(shape, generator=random).bfloat16()
    expected = total + other.float()
    for part, more in optim.pieces(total, other):
        part += more
        assert part.numel() <= max(6, total[:1].numel() if shape else 1)
    assert torch.equal(total, expected)
