"""Two processes with half a batch each train exactly like one with the whole batch."""

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # as this file is also the program of the processes

from points import make_batch, make_model
from torch import Tensor

from mmpt.cached import CachedFeatures
from mmpt.distributed import gather, pad_to_longest, world_size
from mmpt.features import Features
from mmpt.heads import ContrastiveHead, GroupContrastiveHead, MatchingHead

SIZE = 8
GROUPS = torch.tensor([0, 0, 0, 1, 2, 1, 3, 4])  # rows with positives lie unevenly: four in the first half, one behind
HEADS = {
    "softmax": lambda: ContrastiveHead("points", same_group="soft"),
    "softmax mask": lambda: ContrastiveHead("points", same_group="mask"),
    "sigmoid": lambda: ContrastiveHead("points", loss="sigmoid", same_group="soft", bias=-2.0),
    "sigmoid mask": lambda: ContrastiveHead("points", loss="sigmoid", same_group="mask", bias=-2.0),
    "softmax blocks": lambda: ContrastiveHead("points", same_group="soft", chunk=3),
    "softmax mask blocks": lambda: ContrastiveHead("points", same_group="mask", chunk=3),
    "sigmoid blocks": lambda: ContrastiveHead("points", loss="sigmoid", same_group="soft", bias=-2.0, chunk=3),
    "grouped": lambda: GroupContrastiveHead("points"),
    "grouped blocks": lambda: GroupContrastiveHead("points", chunk=3),
    "matching": lambda: MatchingHead("points"),
}
CACHED = ("softmax", "sigmoid", "grouped", "matching")


def measure(rank: int, processes: int) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of every head, averaged over processes as DistributedDataParallel does."""
    results = {}
    rows = range(rank * SIZE // processes, (rank + 1) * SIZE // processes)
    for name, chunk in [*((name, None) for name in HEADS), *((name, 3) for name in CACHED)]:
        torch.manual_seed(0)
        model, head = make_model(), HEADS[name]()
        head.bind(model)
        batch = make_batch(model, [n * 5 % 64 for n in rows], group=GROUPS[list(rows)])
        features = Features(model, batch, seed=5) if chunk is None else CachedFeatures(model, batch, chunk, seed=5)
        output = head(features)
        output.loss.backward()
        values = {"loss": output.loss.detach(), "accuracy": output.logs["accuracy"]}
        for part, module in (("model", model), ("head", head)):
            for key, parameter in module.named_parameters():
                values[f"{part}.{key}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if processes > 1:
            for value in values.values():
                dist.all_reduce(value)
                value /= processes
        results[name if chunk is None else f"{name} cached"] = values
    return results


def evaluate(rank: int) -> float:
    """A loss of this process's own rows; the other process has fewer."""
    torch.manual_seed(0)
    model, head = make_model(), ContrastiveHead("points")
    head.bind(model)
    head.eval()
    return head(Features(model, make_batch(model, range(3 + 4 * rank)))).loss.item()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    everyone, offset = gather(torch.tensor([[float(rank)], [10.0 + rank]]))
    results = {
        "heads": measure(rank, 2),
        "gathered": everyone,
        "offset": offset,
        "world_size": world_size(),
        "padded": pad_to_longest(torch.ones(2, 3 + 2 * rank, 2)),
        "evaluated": evaluate(rank),
    }
    dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    logs = [(tmp_path / f"{rank}.log").open("w+") for rank in (0, 1)]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], stderr=logs[rank]) for rank in (0, 1)
    ]
    try:
        end = time.monotonic() + 240
        # where one has failed the other waits for it without end
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, "two processes wait for each other"
            time.sleep(0.05)
        assert [process.poll() for process in processes] == [0, 0], [Path(log.name).read_text() for log in logs]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = measure(0, 1)
    for name, expected in alone.items():
        assert expected["loss"] > 0
        for key, value in expected.items():
            for result in (first, second):
                difference = (result["heads"][name][key] - value).abs().max()
                assert difference < 1e-5 * max(1.0, float(value.abs().max())), (name, key)
        gradients = {key for key, value in expected.items() if value.any()}
        assert ("head.temperature.logit_scale" in gradients) != name.startswith("matching")
        assert ("head.classifier.weight" in gradients) == name.startswith("matching")
        assert any("points.encoder" in key for key in gradients)
        assert ("head.logit_bias" in gradients) == name.startswith("sigmoid")
    for rank, result in enumerate((first, second)):
        assert result["world_size"] == 2
        assert result["offset"] == 2 * rank
        assert result["gathered"].flatten().tolist() == [0.0, 10.0, 1.0, 11.0]
        assert result["padded"].shape == (2, 5, 2)
        assert result["padded"].sum() == 2 * 2 * (3 + 2 * rank)
        assert abs(result["evaluated"] - evaluate(rank)) < 1e-6


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    everyone, offset = gather(rows)
    assert everyone is rows
    assert (offset, world_size()) == (0, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
