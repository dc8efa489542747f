"""The stand-in for a GPU refuses what a GPU refuses, and replays a graph as a GPU does; the scripts run on it."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.engine.processes import Processes
from src.engine.sampling import Sampler
from tests.helpers import load_script, tiny_model, write_sums
from tests.pretend_gpu import PretendGPU, pretend_gpu

train, score = load_script("train"), load_script("test")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    with pretend_gpu(monkeypatch) as gpu:
        yield gpu


class TestDevices:
    def test_tensors_say_where_they_are(self, gpu: PretendGPU):
        here = torch.ones(2)
        there = here.cuda()
        assert here.device.type == "cpu" and there.device.type == "cuda" and there.is_cuda and not here.is_cuda
        assert there[:1].device == (there + 1).device == torch.zeros_like(there).device == there.new_zeros(3).device
        assert torch.zeros(1, device="cuda").device == torch.tensor([1], device=there.device).device == there.device
        assert here.to(there).device == there.device and there.to("cpu", torch.long).device.type == "cpu"
        assert there.to(torch.float64).device == there.device and there.to(torch.float64).dtype == torch.float64

    def test_a_copy_is_a_copy(self, gpu: PretendGPU):
        here = torch.ones(2)
        there = here.cuda()
        here.zero_()
        assert there.tolist() == [1, 1] and there.cpu().tolist() == [1, 1]

    @pytest.mark.parametrize(
        "mix", [torch.add, torch.mul, lambda a, b: torch.cat([a, b]), lambda a, b: torch.where(a > 0, a, b), torch.dot]
    )
    def test_both_devices_in_one_operation_are_refused(self, gpu: PretendGPU, mix: Callable):
        here = torch.ones(2)
        with pytest.raises(AssertionError, match="both devices"):
            mix(here.cuda(), here)

    def test_the_other_card_is_another_device(self, gpu: PretendGPU):
        first, second = torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1")
        assert first.device == torch.device("cuda:0") and (second + 1).device == torch.device("cuda:1")
        assert first.to(second).device == second.to("cuda:1").device == second.device
        with pytest.raises(AssertionError, match="both devices"):
            first + second
        torch.cuda.set_device(second.device)
        assert torch.ones(2).cuda().device == torch.zeros(1, device="cuda").device == second.device
        assert first.cpu().cuda().device == second.device and first.to("cuda:0").device == first.device

    def test_what_pytorch_moves_by_itself_is_not(self, gpu: PretendGPU):
        there = torch.arange(3.0, device="cuda")
        assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        assert there.copy_(torch.ones(3)).tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "mistake",
        [
            lambda here, there: there.index_put_((there.long(),), here),
            lambda here, there: here[there.long()],
            lambda here, there: here * there.sum(),
            lambda here, there: there.numpy(),
            lambda here, there: torch.rand(2, device="cuda", generator=torch.Generator()),
        ],
    )
    def test_other_mistakes_are_refused(self, gpu: PretendGPU, mistake: Callable):
        here = torch.zeros(2)
        with pytest.raises(AssertionError):
            mistake(here, here.cuda())

    def test_gradients_are_where_their_weights_are(self, gpu: PretendGPU):
        model = tiny_model("qwen2").cuda()
        ids = torch.arange(6, device="cuda")[None]
        model(input_ids=ids).logits.square().mean().backward()
        assert all(p.grad.device.type == "cuda" for p in model.parameters())
        with pytest.raises(AssertionError, match="both devices"):
            model(input_ids=ids.cpu())


class TestGraphs:
    WAITS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, bool, float, lambda t: t.new_tensor([1.0]))
    WAITS += (
        lambda t: torch.tensor([1], device="cuda"),
        lambda t: t[torch.tensor([0])],
        lambda t: t.copy_(torch.ones(1)),
        lambda t: t[t > 0],
        lambda t: t.unique(),
        lambda t: t.allclose(t),
        lambda t: torch.cuda.synchronize(),
    )

    @pytest.mark.parametrize("wait", WAITS)
    def test_waiting_is_counted_and_refused_during_a_capture(self, gpu: PretendGPU, wait: Callable):
        tensor = torch.ones(1, device="cuda")
        before = gpu.waits
        wait(tensor)
        assert gpu.waits == before + 1
        with pytest.raises(AssertionError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait(tensor)

    def test_a_capture_changes_nothing_and_every_replay_works_with_what_is_there(self, gpu: PretendGPU):
        count, seen = torch.zeros(1, device="cuda"), torch.zeros(5, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            double = (count + 1) * 2
            seen[1:4].add_(double)
            torch.add(count, 1, out=count)
        assert count.tolist() == [0] and seen.tolist() == [0] * 5 and double.isnan().all()
        graph.replay()
        count += 10
        graph.replay()
        assert count.tolist() == [12] and seen.tolist() == [0, 26, 26, 26, 0] and double.tolist() == [24]

    def test_a_capture_is_of_the_current_card_alone(self, gpu: PretendGPU):
        count, graph = torch.zeros(1, device="cuda:1"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            count += 1
        assert count.tolist() == [1]
        with pytest.raises(AssertionError, match="empty"):
            graph.replay()
        torch.cuda.set_device(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            count += 1
        graph.replay()
        assert count.tolist() == [2]

    def test_a_replay_does_not_see_a_new_tensor_or_number(self, gpu: PretendGPU):
        holder = {"tensor": torch.ones(1, device="cuda"), "number": 1}
        weight, out, graph = torch.nn.Parameter(torch.ones(1, device="cuda")), [], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            out.append(holder["tensor"] * weight + holder["number"])
        holder.update(tensor=torch.full((1,), 9.0, device="cuda"), number=9)
        weight.data = torch.full((1,), 9.0, device="cuda")
        graph.replay()
        assert out[0].tolist() == [2]

    def test_a_replay_overwrites_what_others_of_its_pool_have_made(self, gpu: PretendGPU):
        made, graphs, kept = [], [], torch.zeros(1, device="cuda")
        for _ in range(2):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=graphs[0].pool() if made else None):
                made.append(torch.ones(1, device="cuda") + 1)
                kept.add_(made[-1])
        for graph in graphs:
            graph.replay()
        assert kept.tolist() == [4] and made[1].tolist() == [2] and made[0].isnan().all()


def test_the_card_that_is_named_samples_what_the_cpu_samples(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)  # put back afterwards
    device, prompts = Processes().choose_device("cuda:1"), [[3, 4, 5], [6, 7]]
    model = tiny_model("qwen2")
    expected = Sampler(model, [1], 0).generate(prompts, max_new_tokens=12)
    out = Sampler(copy.deepcopy(model).to(device), [1], 0).generate(prompts, max_new_tokens=12)
    assert out.ids.device == device and torch.equal(out.ids.cpu(), expected.ids)


def test_train_py_its_resume_and_test_py_run_on_cuda(
    gpu: PretendGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_sums(Path("data"))
    flags = "--preset tiny --dataset data --cold_start_batch_size 8 --prompts_per_step 2 --group_size 4 --eval_every 2"
    flags += " --max_completion_tokens 12 --eval_samples 6 --kl_coef 0.1 --cold_start_steps 2 --save_every 2"
    for more in ("--max_steps 4", "--max_steps 4 --resume checkpoints/step_000002 --checkpoint_dir again"):
        assert train.main(f"{flags} {more}".split()) == 0
    assert "cuda (pretend" in Path("logs/train.log").read_text(encoding="utf-8")
    for name in ("model.safetensors", "trainer.safetensors"):
        assert Path("again/final", name).read_bytes() == Path("checkpoints/final", name).read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert score.main(["--checkpoint", "again/final", "--dataset", "data", "--num_samples", "3"]) == 0
    assert "on 3 problems" in capsys.readouterr().out
