"""What processes share out, gather and agree on, and what becomes of them when one of them fails."""

import math
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

import src.cold_start
import src.engine.processes
from src.cold_start import ColdStart
from src.engine.lora import add_lora
from src.engine.processes import Processes, connect
from src.errors import UserError
from tests.helpers import load_script, tiny_model
from tests.ranks import on_each
from tests.test_cold_start import batch

LOST = "UserError: Another process of this run has ended, or does not answer ("


class TestOneProcess:
    def test_it_has_no_group_and_gets_back_what_it_gave(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        one, tensor, given = connect(), torch.ones(2), object()
        assert not dist.is_initialized()
        assert one.gather(lambda: given)[0] is given and one.sum(tensor)[0] is tensor is one.rows(tensor, 3)
        assert one.tensors_of_first(lambda: {"a": tensor})["a"] is tensor
        assert one.problems(3) == [0, 1, 2] and one.owners(2) == [(0, 0), (0, 1)]
        assert one.mean({"a": 0.1}) == {"a": 0.1} and one.waited == 0.0
        assert one.asked_to_stop(None) is None and one.asked_to_stop(15) == 15
        assert one.first_to_tell() and one.first_to_tell()
        one.close()

    def test_an_error_is_its_own(self) -> None:
        with pytest.raises(ZeroDivisionError):
            Processes().gather(lambda: 1 / 0)


class TestShares:
    @pytest.mark.parametrize(("world", "count"), [(1, 3), (2, 5), (3, 3), (3, 7), (4, 6)])
    def test_every_problem_is_one_process_s_and_found_again(self, world: int, count: int) -> None:
        shares = [Processes(rank, world).problems(count) for rank in range(world)]
        assert sorted(problem for share in shares for problem in share) == list(range(count))
        assert [shares[rank][place] for rank, place in Processes(0, world).owners(count)] == list(range(count))

    def test_a_process_without_a_problem_repeats_one_that_is_found_elsewhere(self) -> None:
        assert [Processes(rank, 3).problems(2) for rank in range(3)] == [[0], [1], [0]]
        assert Processes(2, 3).owners(2) == [(0, 0), (1, 0)]

    def test_a_process_learns_from_whole_groups_and_none_is_left_out(self) -> None:
        rows = torch.tensor([0, 2, 6, 7, 8, 9, 12, 14])  # of groups 0, 2, 3 and 4
        shares = [Processes(rank, 3).rows(rows, 3).tolist() for rank in range(3)]
        assert shares == [[0, 2, 12, 14], [6, 7, 8], [9]]
        assert Processes(1, 2).rows(rows[:1], 3).tolist() == []

    def test_tensors_of_the_first_process_reach_the_others(self) -> None:
        mine = {"a": torch.arange(6.0).view(2, 3), "adam/step/a": torch.tensor(7.0), "b": torch.ones(2) / 3}
        for received in on_each(2, lambda p: p.tensors_of_first(lambda: {} if p.rank else mine)):
            assert received.keys() == mine.keys()
            assert all(torch.equal(received[name], tensor) for name, tensor in mine.items())


def count_bytes(processes: Processes, lora: int | None) -> tuple[int, int, int]:
    """Numbers trained, bytes of gradient and of all else that one step of the cold start hands over."""
    model, sent = tiny_model("qwen2"), {"gradient": 0, "else": 0}
    if lora:
        add_lora(model, lora, 0)
    trainer, reduce, gather = ColdStart(model, 1.0, 512, processes), dist.all_reduce, dist.all_gather_object

    def count_sum(tensor: torch.Tensor) -> None:
        sent["gradient" if tensor.dtype == torch.float32 and tensor.numel() > 100 else "else"] += tensor.nbytes
        reduce(tensor)

    def count_object(parcels: list[bytes], parcel: bytes) -> None:
        sent["else"] += len(parcel)
        gather(parcels, parcel)

    dist.all_reduce, dist.all_gather_object = count_sum, count_object
    src.engine.processes.BUCKET = 5000  # several buckets
    trainer.step(batch(), 1e-2)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sent["gradient"], sent["else"]


@pytest.mark.parametrize("lora", [None, 2])
def test_a_step_hands_over_four_bytes_for_each_number_that_is_trained_and_little_else(lora: int | None) -> None:
    numbers = sum(p.numel() for p in tiny_model("qwen2").parameters())
    for trained, gradient, rest in on_each(2, lambda p: count_bytes(p, lora)):
        assert gradient == 4 * trained and (trained < numbers / 5 if lora else trained == numbers)
        assert rest < 4000


class TestAgreement:
    """What one process alone knows, and all have to do."""

    def test_an_error_of_one_is_raised_by_all(self) -> None:
        def work(processes: Processes) -> None:
            def fail() -> int:
                if processes.rank == 1:
                    raise UserError("no paper left")
                return 7

            assert processes.gather(lambda: 3) == [3, 3, 3]
            processes.gather(fail)

        assert on_each(3, work) == ["UserError: no paper left"] * 3

    def test_a_signal_of_one_stops_all(self) -> None:
        given = [None, signal.SIGINT, None]
        assert on_each(3, lambda p: (p.asked_to_stop(None), p.asked_to_stop(given[p.rank]))) == [(None, 2)] * 3

    def test_a_launcher_that_is_gone_counts_as_sigterm(self) -> None:
        def work(processes: Processes) -> int | None:
            if processes.rank == 1:
                processes.launcher = -1
            return processes.asked_to_stop(None)

        assert on_each(2, work) == [signal.SIGTERM] * 2

    def test_one_alone_tells_why_the_run_ends(self) -> None:
        assert sorted(on_each(3, lambda p: (p.first_to_tell(), p.first_to_tell()))) == [
            (False, False),
            (False, False),
            (True, False),
        ]

    def test_one_that_cannot_ask_the_others_tells(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gone, silent = Event(), Event()

        def fail(*_: Any) -> int:
            gone.set()
            raise RuntimeError("Broken pipe")

        monkeypatch.setattr(src.engine.processes, "LAST_WORD", 0.01)
        assert Processes(1, 2, SimpleNamespace(add=lambda *_: silent.wait() or 2)).first_to_tell()
        monkeypatch.setattr(src.engine.processes, "LAST_WORD", None)
        assert Processes(1, 2, SimpleNamespace(add=fail)).first_to_tell() and gone.is_set()
        silent.set()

    def test_means_are_over_all(self) -> None:
        assert on_each(2, lambda p: p.mean({"a": 1.0 + p.rank, "b": 0.0})) == [{"a": 1.5, "b": 0.0}] * 2


def learn(spoil: Callable[[ColdStart, Processes], None]) -> Callable[[Processes], dict[str, Any]]:
    """A step of the cold start in which something happens to one process."""

    def work(processes: Processes) -> dict[str, Any]:
        trainer = ColdStart(tiny_model("qwen2"), 1.0, 256, processes)
        before = {name: master.clone() for name, master in trainer.optimizer.master.items()}
        if processes.rank == 1:
            spoil(trainer, processes)
        metrics = trainer.step(batch(), 1e-2)
        moved = any(not torch.equal(master, before[name]) for name, master in trainer.optimizer.master.items())
        return {"moved": moved, "skipped": metrics["skipped_steps"], "budget": trainer.token_budget}

    return work


class TestFaults:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_on_one_skips_the_step_on_all(self, bad: float) -> None:
        def spoil(trainer: ColdStart, processes: Processes) -> None:
            next(trainer.model.parameters()).register_hook(lambda gradient: gradient * bad)

        assert on_each(2, learn(spoil)) == [{"moved": False, "skipped": 1.0, "budget": 256}] * 2

    def test_a_loss_that_is_not_finite_on_one_skips_the_step_on_all(self) -> None:
        def spoil(trainer: ColdStart, processes: Processes) -> None:
            work = src.cold_start.supervised_gradients
            src.cold_start.supervised_gradients = lambda *parts: work(*parts) * math.nan

        assert on_each(2, learn(spoil)) == [{"moved": False, "skipped": 1.0, "budget": 256}] * 2

    @staticmethod
    def fill_memory(times: int) -> Callable[[ColdStart, Processes], None]:
        def spoil(trainer: ColdStart, processes: Processes) -> None:
            work, calls = src.cold_start.supervised_gradients, []

            def failing(*parts: Any) -> float:
                calls.append(parts)
                if len(calls) <= times:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return work(*parts)

            src.cold_start.supervised_gradients = failing

        return spoil

    def test_a_full_memory_on_one_halves_the_micro_batches_of_all_from_then_on(self) -> None:
        assert on_each(2, learn(self.fill_memory(1))) == [{"moved": True, "skipped": 0.0, "budget": 128}] * 2

    def test_a_memory_too_small_on_one_ends_all_with_what_to_do(self) -> None:
        first, second = on_each(2, learn(self.fill_memory(99)))
        assert first == second and first.startswith("UserError: The memory is full even with")

    def test_a_process_that_dies_is_missed_at_once(self) -> None:
        def work(processes: Processes) -> None:
            processes.gather(lambda: 1)
            if processes.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            processes.sum(torch.ones(1))

        first, second, third = on_each(3, work)
        assert second == "" and first.startswith(LOST) and third.startswith(LOST)
        assert "--resume goes on from the last checkpoint" in first

    def test_a_process_that_hangs_is_waited_for_no_longer_than_agreed(self) -> None:
        def work(processes: Processes) -> None:
            pids = processes.gather(os.getpid)
            if processes.rank == 1:
                signal.pause()
            _set_pg_timeout(timedelta(seconds=0.5))
            try:
                processes.gather(lambda: 1)
            finally:
                os.kill(pids[1], signal.SIGKILL)

        assert on_each(2, work)[0].startswith(LOST)

    def test_a_process_that_never_comes_is_waited_for_as_long_as_it_is_said(self, monkeypatch) -> None:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
        for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "PROCESS_TIMEOUT": "0.5"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"does not answer \(.*PROCESS_TIMEOUT sets") as caught:
            connect()
        assert "\n" not in str(caught.value)

    def test_what_nccl_says_is_handed_on_and_nobody_else_blamed_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its texts, as torch 2.13 puts them."""
        begin = "[Rank 0] NCCL error in: /src/NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.28.9\n"
        full = "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        gone = "ncclRemoteError: A call failed possibly due to a network error.\nLast error:\nConnection closed by peer"
        for text, said in (
            (full.partition("\nCuda")[0], r"NCCL failed between the cards of this run \(.*CUDA function failed"),
            (full, r"NCCL failed between the cards of this run \(Cuda failure 2 'out of memory'\): look above"),
            (gone, r"Another process of this run has ended, .* \(Connection closed by peer\): look above"),
        ):

            def fail(*_: object, text: str = text) -> None:
                raise RuntimeError(begin + text)

            monkeypatch.setattr(dist, "all_reduce", fail)
            with pytest.raises(UserError, match=said):
                Processes(0, 2).sum(torch.ones(1))

    def test_they_meet_only_when_each_has_a_card(self) -> None:
        def work(fail: bool) -> Callable[[Processes], int]:
            def meet(processes: Processes) -> int:
                met, add = [], dist.all_reduce
                dist.all_reduce = lambda tensor: met.append(tensor) or add(tensor)
                if fail and processes.rank == 1:
                    raise UserError("no card")
                processes.meet()
                return len(met)

            return meet

        assert on_each(2, work(False)) == [1, 1]
        first, second = on_each(2, work(True))
        assert first.startswith(LOST) and second == "UserError: no card"

    def test_a_patience_that_is_no_number_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("PROCESS_TIMEOUT", "long")
        with pytest.raises(UserError, match="PROCESS_TIMEOUT is 'long': give a number of seconds"):
            connect()

    def test_an_environment_that_is_not_torchrun_s_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "two")
        for rank, reason in ((None, "RANK expected, but not set"), ("0", "invalid literal")):
            monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
            with pytest.raises(UserError, match=f"WORLD_SIZE is set, but not as torchrun does it .*{reason}"):
                connect()


class TestDevice:
    def test_each_of_several_processes_takes_the_card_of_its_place_on_the_machine(self, monkeypatch) -> None:
        current: list[torch.device] = []
        monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setenv("LOCAL_RANK", "1")
        processes = Processes(rank=5, world=8)
        assert processes.choose_device("cuda") == processes.device == torch.device("cuda:1") == current[0]
        assert Processes(5, 8).choose_device("cpu") == torch.device("cpu")
        assert Processes().choose_device("cpu:0") == torch.device("cpu", 0)

    def test_of_one_process_the_card_named_is_the_current_one(self, monkeypatch) -> None:
        current: list[torch.device] = []
        monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        assert Processes().choose_device("cuda:1") == torch.device("cuda:1") == current[0]

    def test_cudnn_s_attention_is_off_and_memory_grows_in_segments_unless_the_user_says_otherwise(self, monkeypatch):
        switched: list[bool] = []
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
        settings = {"": None, "PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": "", "WSL": None}
        for name, value in settings.items():
            with monkeypatch.context() as patch:
                release = "5.15.153.1-microsoft-standard-WSL2" if name == "WSL" else "6.8.0-40-generic"
                patch.setattr("platform.release", lambda release=release: release)
                patch.delenv("PYTORCH_ALLOC_CONF", raising=False)
                patch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
                if value is not None:
                    patch.setenv(name, value)
                Processes().choose_device("cpu")
                expected = {"": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "backend:native"}.get(name)
                assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
        assert switched == [False] * 4

    @pytest.mark.parametrize("script", ["train", "test"])
    def test_cudnn_s_attention_is_off_before_a_model_is_loaded(self, script: str, monkeypatch, tmp_path) -> None:
        seen, module = [], load_script(script)

        def load(*_: Any) -> None:
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            raise UserError("enough")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(getattr(module, "models", module), "load_model", load)
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            assert module.main(["--preset", "tiny"] if script == "train" else ["--model", "tiny"]) == 1
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
        assert seen == [False]

    def test_a_card_that_is_not_there_is_refused_with_what_to_do(self, monkeypatch) -> None:
        def fail(*_: int, device: torch.device) -> None:
            raise RuntimeError("CUDA error: invalid device ordinal\nand much more")

        monkeypatch.setattr(torch, "zeros", fail)
        monkeypatch.setenv("LOCAL_RANK", "4")
        with pytest.raises(UserError, match=r"no device 'cuda' .*invalid device ordinal.*no more processes than cards"):
            Processes(4, 8).choose_device("cuda")
