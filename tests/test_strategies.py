"""Lightning's strategies on two processes: DDP and FSDP2 take the steps of one process with the whole batch."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as this file is also the program of the processes

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from points import make_pretraining, make_trainer
from shapes import PointsSource

from mmpt.data import MultimodalData
from mmpt.heads import ContrastiveHead, GroupContrastiveHead, MatchingHead

STEPS = 4
CASES = ["ddp", "ddp cached", "fsdp", "fsdp cached"]


class Watch(L.Callback):
    """Losses of all steps, averaged over processes, and how often gradients were reduced."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.reductions: list[int] = []
        self.names: list[str] = []

    def on_fit_start(self, trainer, pl_module):
        if isinstance(trainer.strategy, DDPStrategy) and trainer.world_size > 1:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def count(state, bucket):
                self.reductions[-1] += 1
                return allreduce_hook(None, bucket)

            trainer.strategy.model.register_comm_hook(None, count)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reductions.append(0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses.append(loss.item())
        self.names += batch.names


def run(case: str, processes: int) -> dict:
    """A short training; what it saw, and the weights after it."""
    torch.manual_seed(0)
    heads = {
        "c": ContrastiveHead("points", loss="sigmoid", bias=-2.0),
        "s": ContrastiveHead("points"),
        "g": GroupContrastiveHead("points"),
        "m": MatchingHead("points"),
    }
    module = make_pretraining(heads, lr=1e-3, cached_chunk=3 if "cached" in case else None)
    for name in module.model.processors:  # augmentation would differ between one process and two
        processor = module.model.processors[name]
        module.model.modality(name).encoder.processor = Plain(processor)
    data = MultimodalData({"figures": PointsSource(size=64)}, batch_size=16 // processes)
    watch = Watch()
    options: dict = {"max_steps": STEPS, "limit_val_batches": 0, "callbacks": [watch], "use_distributed_sampler": False}
    if processes > 1 and case.startswith("ddp"):
        options |= {
            "strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
            "devices": processes,
        }
    elif processes > 1:
        strategy = ModelParallelStrategy(processes, 1, process_group_backend="gloo", save_distributed_checkpoint=False)
        options |= {"strategy": strategy, "devices": processes}
    trainer = make_trainer(**options)
    trainer.fit(module, data)
    state = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }
    sharded = sum(hasattr(parameter, "full_tensor") for parameter in module.parameters())
    return {
        "losses": watch.losses,
        "reductions": watch.reductions,
        "names": watch.names,
        "state": state,
        "sharded": sharded,
        "parameters": len(list(module.parameters())),
    }


class Plain:
    """A processor without augmentation."""

    def __init__(self, processor) -> None:
        self.processor = processor

    def __call__(self, samples, *, training=False):
        return self.processor(samples)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {case: run(case, 2) for case in CASES}
    torch.save(results, folder / f"{os.environ['LOCAL_RANK']}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes report for each case."""
    folder = tmp_path_factory.mktemp("strategies")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [(folder / f"{rank}.log").open("w+") for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in (0, 1)
    ]
    try:
        end = time.monotonic() + 240
        # where one has failed the other waits for it without end
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, "two processes wait for each other"
            time.sleep(0.05)
        assert [p.poll() for p in processes] == [0, 0], [Path(log.name).read_text()[-3000:] for log in logs]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(two, case):
    alone = run(case, 1)
    first, second = two[0][case], two[1][case]
    assert sorted(first["names"] + second["names"]) == sorted(alone["names"])
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert alone["losses"][-1] != pytest.approx(alone["losses"][0], rel=1e-3)
    for name, value in alone["state"].items():
        if not name.endswith("key.bias"):  # has no gradient but rounding, which AdamW makes a step of
            torch.testing.assert_close(first["state"][name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("case", ["ddp", "ddp cached"])
def test_gradients_are_reduced_once_a_step(two, case):
    assert two[0][case]["reductions"] == [1] * STEPS


@pytest.mark.parametrize("case", ["fsdp", "fsdp cached"])
def test_every_parameter_is_sharded(two, case):
    assert two[0][case]["sharded"] == two[0][case]["parameters"] > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
