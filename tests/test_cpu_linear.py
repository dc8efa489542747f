"""oneDNN products: equal to the plain ones, only where they help, and gone when sampling ends, however it ends."""

import pytest
import torch
from torch import Tensor, nn

import src.engine.cpu_linear
from src.engine.cpu_linear import AVAILABLE, linear, packable, packed_weights
from src.engine.sampling import Sampler
from tests.helpers import ARCHITECTURES, VOCABULARY, plain_logps, plain_sample, random_texts, tiny_model

needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="needs oneDNN on x86")
SIZE = 640  # 640 * 640 entries: large enough
END_IDS = [1, 2, 5, 8, 13]


def make_layer(inputs: int = SIZE, outputs: int = SIZE, bias: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    """In double precision, as products and sums."""
    out = torch.einsum("...i,oi->...o", x.double(), layer.weight.double())
    return (out if layer.bias is None else out + layer.bias.double()).detach()


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what goes through oneDNN."""
    seen, original = [], src.engine.cpu_linear._product

    def product(x, weight, bias):
        seen.append(tuple(x.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(src.engine.cpu_linear, "_product", product)
    return seen


@pytest.fixture
def pack_everything(monkeypatch) -> None:
    monkeypatch.setattr(src.engine.cpu_linear, "SMALLEST", 0)


@needs_onednn
class TestProducts:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(1, SIZE), (7, SIZE), (64, SIZE), (3, 5, SIZE)])
    def test_a_packed_layer_gives_what_the_layer_gives(self, shape, bias: bool, products):
        layer, x = make_layer(bias=bias), torch.randn(shape)
        with packed_weights(nn.Sequential(layer)), torch.no_grad():
            y = layer(x)
        assert products == [shape]
        torch.testing.assert_close(y.double(), exact(layer, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_product_with_weights_as_they_lie_gives_what_the_layer_gives(self, bias: bool, products):
        layer, x = make_layer(outputs=3 * SIZE, bias=bias), torch.randn(11, SIZE)
        y = linear(x, layer.weight, layer.bias)
        assert products == [(11, SIZE)] and not y.requires_grad
        torch.testing.assert_close(y.double(), exact(layer, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("outputs", "dtype"), [(8, torch.float32), (SIZE, torch.bfloat16), (SIZE, torch.float64)], ids=str
    )
    def test_small_layers_and_other_precisions_stay_as_they_are(self, outputs: int, dtype: torch.dtype, products):
        layer, x = make_layer(outputs=outputs, dtype=dtype), torch.randn(2, SIZE, dtype=dtype)
        plain = layer(x)
        with packed_weights(nn.Sequential(layer)):
            assert torch.equal(layer(x), plain)
        assert torch.equal(linear(x, layer.weight, layer.bias), plain)
        assert products == []

    def test_a_class_derived_from_linear_keeps_its_own_forward(self, products):
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        layer, x = Doubled(SIZE, SIZE), torch.randn(2, SIZE)
        plain = layer(x)
        with packed_weights(nn.Sequential(layer)):
            assert torch.equal(layer(x), plain)
        assert products == []


class TestWhatIsLeftBehind:
    def test_afterwards_a_layer_has_its_own_forward_and_a_gradient(self):
        layer, x = make_layer(), torch.randn(2, SIZE)
        plain = layer(x)
        with packed_weights(nn.Sequential(layer)):
            pass
        assert "forward" not in vars(layer) and torch.equal(layer(x), plain)
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(SIZE, -1))

    def test_a_failure_inside_leaves_nothing_behind(self):
        layer = make_layer()
        with pytest.raises(KeyError), packed_weights(nn.Sequential(layer)):
            raise KeyError
        assert "forward" not in vars(layer)

    @needs_onednn
    def test_a_failure_while_packing_leaves_nothing_behind(self, monkeypatch):
        model, original = nn.Sequential(make_layer(), make_layer()), src.engine.cpu_linear._packed_forward
        monkeypatch.setattr(
            src.engine.cpu_linear, "_packed_forward", lambda layer: original(layer) if layer is model[0] else 1 / 0
        )
        with pytest.raises(ZeroDivisionError), packed_weights(model):
            pass
        assert all("forward" not in vars(layer) for layer in model)

    def test_where_onednn_is_missing_everything_stays_as_it_is(self, monkeypatch, products):
        monkeypatch.setattr(src.engine.cpu_linear, "AVAILABLE", False)
        layer, x = make_layer(), torch.randn(2, SIZE)
        with packed_weights(nn.Sequential(layer)):
            assert "forward" not in vars(layer)
        assert torch.equal(linear(x, layer.weight, layer.bias), layer(x)) and products == []


@needs_onednn
class TestSampling:
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_packed_weights_sample_what_running_the_whole_text_does(
        self, kind: str, temperature: float, pack_everything, products
    ):
        model, prompts = tiny_model(kind), random_texts((5, 11, 2), seed=1)
        uniforms = torch.rand(6, 12, generator=torch.Generator().manual_seed(3))
        completions = Sampler(model, END_IDS, 0, rows=4).generate(
            prompts, group_size=2, max_new_tokens=12, temperature=temperature, uniforms=uniforms
        )
        assert products
        for row, (ids, mask) in enumerate(zip(completions.ids, completions.mask, strict=True)):
            text = plain_sample(model, prompts[row // 2], uniforms[row].tolist(), temperature, END_IDS)
            assert ids[mask].tolist() == text
            with torch.no_grad():
                logps = plain_logps(model, prompts[row // 2], text, temperature or 1.0)
            torch.testing.assert_close(completions.logps[row][mask], logps, rtol=1e-4, atol=1e-4)

    def test_changed_weights_count_from_the_next_call_on(self, pack_everything):
        model, prompt = tiny_model(), random_texts((7,), seed=2)
        sampler = Sampler(model, [], 0)
        before = sampler.generate(prompt, max_new_tokens=8).ids
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(-0.7)
        after = sampler.generate(prompt, max_new_tokens=8).ids
        assert not torch.equal(before, after)
        assert after[0].tolist() == plain_sample(model, prompt[0], [0.0] * 8, 0.0, [])

    def test_an_interrupted_call_leaves_the_model_as_it_was(self, pack_everything):
        model = tiny_model()

        def stop(*_) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Sampler(model, END_IDS, 0).generate(random_texts((7,), seed=2), max_new_tokens=8, on_progress=stop)
        assert all("forward" not in vars(layer) for layer in model.modules())


@needs_onednn
class TestWhichLayers:
    def test_a_layer_with_a_forward_of_its_own_keeps_it(self):
        layer = make_layer()
        layer.forward = own = torch.zeros_like
        with packed_weights(nn.Sequential(layer)):
            assert layer.forward is own
        assert layer.forward is own

    def test_large_plain_layers_are_chosen_and_a_tied_head_with_them(self, monkeypatch):
        monkeypatch.setattr(src.engine.cpu_linear, "SMALLEST", VOCABULARY * 32)
        model = tiny_model(tie_word_embeddings=True)
        assert packable(model) == [model.lm_head]
