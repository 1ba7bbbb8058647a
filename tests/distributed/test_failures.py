"""Ranks that differ, fail, or end: every one of them is told, and nothing is mixed up."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import curvlib as cl
from tests.distributed import failures, work
from tests.problems import error
from tests.ranks import Pool, on_ranks

HERE = "tests.distributed.failures"


def test_differences_and_failures_are_everybodys() -> None:
    ranks = on_ranks(f"{HERE}:messages", 3)
    expected = {
        "vectors": "ranks differ in their vectors that are multiplied: rank 2 is not like rank 0",
        "parameters": "ranks differ in their parameters or buffers: rank 2",
        "buffers": "ranks differ in their parameters or buffers: rank 2",
        "program": "ranks differ in their program or problem",
        "code": "ranks differ in their program or problem",
        "nan": "the data of batch 0 is not finite; remove or mend its examples (on rank 2)",
        "no batch": "the data has no batch",
        "no term": "no loss term is valid",
        "graph": "group=False",
        "loop": "sees only the data of one process",
        "after": "True",
    }
    for name, text in expected.items():
        assert all(text in found[name] for found in ranks), (name, [f[name] for f in ranks])
    assert all(
        "sums of different shapes" in f["shapes"] or "ranks differ in their vectors" in f["shapes"]
        for f in ranks
    )
    assert ranks[2]["one fails"] == "LookupError: no such word"
    for found in ranks[:2]:
        assert (
            "rank 2 of 3 failed in a pass over its data: LookupError: no such word"
            in (found["one fails"])
        )
    assert ranks[0]["alone"] == "None"
    assert "no member" in ranks[1]["alone"]
    assert "different process groups" in ranks[0]["groups"]


def test_what_is_suspicious_is_said_once_on_the_first_rank() -> None:
    first, other = on_ranks(f"{HERE}:warned", 2)
    assert not any(other.values())
    assert ["all 2 ranks have shards" in text for text in first["copies"]] == [True]
    assert "it is that many times too large" in first["copies of a sum"][0]
    assert not first["shards"]
    assert "DistributedSampler repeats 1 of 19 examples" in first["padding"][0]
    assert not first["no padding"]


@pytest.mark.parametrize("size", [2, 3])
def test_data_is_cut_without_repeats(size: int) -> None:
    expected = failures.shards(0, 1)
    assert "shuffles" not in expected["shuffled"]  # one process may
    for found in on_ranks(f"{HERE}:shards", size):
        assert "the DataLoader shuffles" in found.pop("shuffled")
        for name, value in found.items():
            if "fingerprint" in name:
                assert value == expected[name], name
            else:
                assert error(value, expected[name]) < 1e-12, name


def test_a_backend_that_cannot_send_is_told() -> None:
    found = on_ranks(f"{HERE}:mixed_devices", 2)
    assert all("the process group's backend sums tensors on cpu, cuda" in text for text in found)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_others(how: str) -> None:
    pool = Pool(2, timeout=60.0 if how == "dies" else 8.0)
    try:
        pool.start(f"{HERE}:dies", (how,))
        assert pool.processes[1].stdout is not None
        assert pool.processes[1].stdout.readline().strip() in ("done", "failed")
        saved = pool.folder / "1.1.pt"
        text = torch.load(saved) if saved.exists() else (pool.folder / "error1.txt").read_text()
    finally:
        pool.close()
    assert "rank 1 of 2 got no answer in an exchange of headers: another rank has ended" in text
    assert "a run with checkpoint= goes on from its last save" in text


def test_groups_are_asked_for_clearly() -> None:
    model = work.net()
    with pytest.raises(RuntimeError, match="needs an initialized process group, and there is none"):
        cl.Risk(model, torch.nn.CrossEntropyLoss(), work.batches(), group=True)
    with pytest.raises(TypeError, match=r"or a torch.distributed.ProcessGroup, got str"):
        cl.Risk(model, torch.nn.CrossEntropyLoss(), work.batches(), group="all")
    with pytest.raises(RuntimeError, match="torchrun"):
        cl.shard(work.batches(), group=True)
    assert cl.Risk(model, torch.nn.CrossEntropyLoss(), work.batches()).group is None
    assert not dist.is_initialized()
