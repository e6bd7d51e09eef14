"""`alphacl plan`: messages byte for byte against real processes, sensible costs, the command."""

import functools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from alphacl_fast import plan
from alphacl_fast.cli import main
from alphacl_fast.distributed import auto_strategy
from alphacl_fast.functional import NEGATIVES
from tools import scaling

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts the processes

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("sizes", "strategy", "ranks_per_node"),
    [
        *(
            (sizes, strategy, None)
            for sizes in [(5,), (5, 3), (4, 0, 0), (7, 1, 4), (3, 1, 4, 2), (4, 4, 4, 4)]
            for strategy in ("gather", "ring")
        ),
        ((5, 3), "two_level", 2),
        ((3, 1, 4, 2), "two_level", 2),
        ((4, 4, 0, 0), "two_level", 2),
        ((2, 1, 0, 3, 1, 2), "two_level", 2),
        ((2, 1, 0, 3, 1, 2), "two_level", 3),
    ],
    ids=str,
)
def test_messages_byte_for_byte(ranks, sizes, strategy, ranks_per_node):
    for negatives in NEGATIVES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            options = {
                "sizes": sizes,
                "dim": 5,
                "dtype": dtype,
                "strategy": strategy,
                "negatives": negatives,
                "ranks_per_node": ranks_per_node,
            }
            for rank, sent in enumerate(ranks.run(len(sizes), scaling.recorded, **options)):
                assert +sent == +plan.messages(
                    strategy, rank, sizes, 5, dtype, negatives,
                    ranks_per_node=ranks_per_node or 1, gloo=True,
                )  # fmt: skip


def test_two_levels_send_less_between_nodes_and_in_fewer_steps():
    sizes, options = (4,) * 64, (8, torch.float32, "two_view")
    flat = plan.messages("ring", 0, sizes, *options)
    levels = plan.messages("two_level", 0, sizes, *options, ranks_per_node=8)
    assert flat["isend"] == 8 * levels["isend"]
    assert plan.traffic(levels, 64, 8) < plan.traffic(flat, 64)


def test_traffic_of_collectives():
    sent = Counter(all_gather=10, reduce_scatter=40, all_reduce=8, isend=3)
    assert plan.traffic(sent, 4) == 3 + 3 * 10 + 30 + 12
    assert plan.traffic(sent, 1) == 3
    sent = Counter(isend=3, node_all_gather=10, node_reduce_scatter=40, node_all_reduce=8)
    assert plan.traffic(sent, 8, 4) == 3 + 3 * 10 + 30 + 12


def test_costs_scale_as_they_must():
    options = {"rate": 3e14, "device": "cuda"}
    few, many = (plan.plan(4_000_000, 512, gpus, **options) for gpus in (64, 128))
    for before, after in zip(few, many, strict=True):
        assert after.flops == before.flops / 2
        assert after.compute < after.seconds < before.seconds
    assert few[0].flops == 4 * 8e6**2 * 512 / 64  # 4n²D of the whole batch
    ring, ring_of_more = few[1], many[1]
    assert ring_of_more.memory == ring.memory / 2  # local rows only
    gathered, gathered_by_more = few[0], many[0]
    assert gathered_by_more.memory > 0.95 * gathered.memory  # everyone's rows
    assert ring.memory < gathered.memory / 10
    slow = plan.plan(4_000_000, 512, 64, bandwidth=1e9, **options)
    assert all(p.seconds > q.seconds for p, q in zip(slow, few, strict=True))
    assert slow[1].seconds >= slow[1].sent / 1e9  # no faster than its messages
    one = plan.plan(4096, 128, 1, rate=1e12)
    assert all(p.seconds == p.compute for p in one)


def test_recommendation():
    plans = plan.plan(4_000_000, 512, 64, rate=3e14, device="cuda")
    assert plan.recommended(plans, None) == min(plans, key=lambda p: p.seconds).strategy
    assert plan.recommended(plans, 5e9) == "ring"
    assert plan.recommended(plans, 1e6) == "neither fits"


def test_two_levels_save_steps():
    """The host and the latency of a ring's steps are divided by the size of a node."""
    options = {"rate": 3e14, "device": "cuda", "ranks_per_node": 8}
    _, ring, levels = plan.plan(1_000_000, 512, 1024, **options)
    assert ring.host > 1024 * plan.HOST_STEP  # two sweeps of 512 steps
    assert ring.seconds > ring.host
    assert levels.host < ring.host / 6
    assert levels.seconds < ring.seconds / 4
    assert levels.memory > ring.memory
    instant = plan.plan(1_000_000, 512, 1024, host=0.0, latency=0.0, bandwidth=1e15, **options)
    for p in instant:  # what is left is the agreement's work for 1,024 statements
        assert p.seconds < p.compute + 0.01
    whole_node, *_ = plan.plan(1_000, 8, 8, **options)
    assert plan.plan(1_000, 8, 8, **options)[2].memory == whole_node.memory
    one, alone = plan.plan(1_000_000, 512, 64, **{**options, "ranks_per_node": 1})[1:]
    assert one.sent == alone.sent


def test_auto_takes_two_levels_where_they_are_predicted_to_be_faster():
    options = {"ranks": 1024, "ranks_per_node": 8, "device": "cuda"}
    choose = functools.partial(auto_strategy, dim=512, dtype=torch.bfloat16, negatives="two_view")
    assert choose(1_000, **options) == "gather"
    assert choose(1_000_000, **options) == "two_level"
    assert choose(100_000_000, **options) == "ring"  # work hides every step
    for nodes in (None, 1, 1024):
        assert choose(1_000_000, **{**options, "ranks_per_node": nodes}) == "ring"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks_per_node": 3}, "ranks_per_node must divide the number of gpus, 4, got 3"),
        ({"host": -1.0}, "host must be at least 0, got -1.0"),
        ({"batch": 3, "gpus": 4}, "batch must be at least 2 and the number of gpus, 4, got 3"),
        ({"bandwidth": 0.0}, "bandwidth must be positive, got 0.0"),
    ],
)
def test_bad_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(**{"batch": 100, "dim": 8, "gpus": 4, "rate": 1e12, **given})


def test_command(capsys):
    assert (
        main(
            [
                "plan",
                "--batch",
                "4000000",
                "--dim",
                "512",
                "--gpus",
                "64",
                "--rate",
                "300",
                "--memory",
                "5",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "4,000,000 pairs of 512 features, bfloat16, two_view, on 64 devices of 300 TFLOP/s "
        "(as given), 50 GB/s" in printed
    )
    assert re.search(r"^gather +37\.18 GB +2,048\.0 TFLOP ", printed, re.M)
    assert re.search(r"^two_level +7\.68 GB +2,048\.0 TFLOP ", printed, re.M)
    assert 'faster and within the memory: ring; strategy="auto" takes ring' in printed
    assert main(["plan", "--batch", "4K", "--dim", "64", "--gpus", "2", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "4,096 pairs of 64 features" in printed
    assert "measured here" in printed
    for arguments, message in (
        (["--batch", "many"], "such as 65536, 64K (65,536) or 4M, got 'many'"),
        (["--batch", "2"], "batch must be at least 2 and the number of gpus, 4, got 2"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *arguments, "--dim", "8", "--gpus", "4", "--rate", "1"])
        assert message in capsys.readouterr().err


def test_tables_of_the_page_are_those_of_the_plan():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.endswith(scaling.tables())
    assert (ROOT / "docs" / "scaling.png").stat().st_size > 5000
