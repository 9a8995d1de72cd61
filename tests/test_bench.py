"""task=bench: where the time went, by traces made by hand; what is timed; the line; once the whole
of it through Ray.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tp_trainer import cli
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, load
from tp_trainer.messages import Evaluated
from tp_trainer.parallel.agreement import STOP
from tp_trainer.tasks import bench
from tp_trainer.tasks.timed import Clock, environment, rates
from tp_trainer.tasks.trace import DATA, PARTS, length, split, union

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
NCCL = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ADAM = (
    "void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>,"
    " FusedAdamMathFunctor<float, 4>>(...)"
)


def tiny(tmp_path: Path, **groups: Any) -> Config:
    return load(
        {
            "model": {"architecture": TINY},
            "data": {"seq_length": 64},
            "checkpoint": {"storage_path": str(tmp_path)},
            **groups,
        }
    )


# -------------------------------------------------------------------------------------------------


def span(
    cat: str, name: str, begin: float, end: float, correlation: int | None = None, tid: int = 1
) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "tid": tid,
        "args": args,
    }


def step_marks(*starts: float, end: float) -> list[dict[str, Any]]:
    return [
        span("user_annotation", f"ProfilerStep#{n}", a, b)
        for n, (a, b) in enumerate(zip(starts, [*starts[1:], end], strict=True), 5)
    ]


def parts_of(found: dict[str, float | None] | None) -> dict[str, int | None]:
    """In whole microseconds."""
    assert found is not None
    return {
        key: None if found[key] is None else round((found[key] or 0) * 1e6)
        for key in ("step", *PARTS)
    }


def test_a_step_on_a_device() -> None:
    """The host is ahead: the step's kernels run from 150 to 400, those up to 150 are the lead's,
    launched before 100.
    """
    events = [
        *step_marks(0, 100, end=200),
        {"ph": "M", "name": "process_name"},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 3},
        span("cuda_runtime", "cudaLaunchKernel", 90, 95, 1),
        span("kernel", "gemm", 120, 150, 1),
        span("cuda_runtime", "cudaLaunchKernel", 110, 112, 2),
        span("kernel", "gemm", 150, 200, 2),
        span("cuda_runtime", "cudaGraphLaunch", 115, 118, 3),
        span("kernel", NCCL, 180, 230, 3),
        span("kernel", "gemm", 225, 240, 3),
        # another thread's is not waited for
        span("user_annotation", DATA, 240, 255),
        span("user_annotation", DATA, 300, 320, tid=9),
        span("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 255, 260, 4),
        span("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 260, 268),
        span("gpu_memset", "Memset (Device)", 268, 270),
        span("cuda_runtime", "cudaLaunchKernel", 190, 192, 5),
        span("kernel", ADAM, 330, 360, 5),
        span("kernel", NCCL, 350, 380, 6),
        span("kernel", "triton_poi_fused_adamw_0", 380, 400, 5),
        span("kernel", "gemm", 390, 400, 6),
        span("gpu_user_annotation", "ProfilerStep#6", 150, 400),
    ]
    random.Random(0).shuffle(events)
    assert parts_of(split(events)) == {
        "step": 250,
        "compute": 50 + 15 + 2 + 10,
        "optimizer": 30 + 10,
        "exposed_communication": 25 + 8 + 20,
        "data_wait": 15 + 5,
        "host_gaps": 60,
        "other": None,
    }


def test_several_steps_are_averaged() -> None:
    events = step_marks(0, 100, 200, 300, end=400)
    for number, (launch, begin, end) in enumerate(
        [(10, 20, 110), (110, 120, 190), (210, 220, 310), (310, 320, 410)]
    ):
        events += [
            span("cuda_runtime", "cudaLaunchKernel", launch, launch + 1, number),
            span("kernel", "gemm", begin, end, number),
        ]
    assert parts_of(split(events)) == {
        "step": 100,
        "compute": round((70 + 90 + 90) / 3),
        "optimizer": 0,
        "exposed_communication": 0,
        "data_wait": 0,
        "host_gaps": round((10 + 30 + 10) / 3),
        "other": None,
    }


def test_a_step_on_cpu() -> None:
    """Only what the host's own marks say; the rest can't be told apart."""
    events = [
        *step_marks(0, 50, 100, end=210),
        span("user_annotation", DATA, 5, 10),
        span("user_annotation", DATA, 50, 54),
        span("user_annotation", "Optimizer.step#AdamW.step", 90, 100),
        span("user_annotation", "Optimizer.step#AdamW.step", 150, 200),
        span("cpu_op", "aten::mm", 60, 90),
        span("user_annotation", DATA, 190, 204),
    ]
    assert parts_of(split(events)) == {
        "step": 80,
        "compute": None,
        "optimizer": 30,
        "exposed_communication": None,
        "data_wait": 4,
        "host_gaps": None,
        "other": 46,
    }


def test_the_parts_add_up_to_the_step() -> None:
    draw = random.Random(1)
    for _ in range(50):
        events = step_marks(0, 100, 200, end=300)
        for number in range(40):
            at, name = draw.uniform(0, 290), draw.choice(["gemm", NCCL, ADAM])
            events += [
                span("cuda_runtime", "cudaLaunchKernel", at, at + 1, number),
                span("user_annotation", DATA, at, at + 9),
            ]
            events.append(span("kernel", name, at + 5, at + draw.uniform(6, 40), number))
        found = split(events)
        assert found is not None and found["step"] is not None
        parts = [value for key in PARTS if (value := found[key]) is not None]
        assert (
            len(parts) == 5
            and min(parts) >= 0
            and sum(parts) == pytest.approx(found["step"], rel=1e-9)
        )


def test_what_can_not_be_split() -> None:
    assert split([]) is None and split(step_marks(0, end=9)) is None
    assert (
        union([(5, 6), (1, 3), (2, 4), (9, 9), (8, 7)]) == [(1, 4), (5, 6)]
        and length([(1, 4), (5, 6)]) == 4
    )


# --------------------------------------------------------------------------------------------------


def test_the_run_that_is_timed(tmp_path: Path) -> None:
    typed = {
        "optim": {"lr": 1e-3, "warmup_steps": 50, "betas": [0.8, 0.9]},
        "experiment_name": "x",
        "tracker": {"kind": "wandb"},
        "train": {
            "num_epochs": 3,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "profile": {"steps": 3},
        },
    }
    config = bench.benched(
        tiny(tmp_path, **typed, bench={"warmup": 3, "steps": 5, "profile_steps": 2})
    )
    assert (
        config.run_dir == f"{tmp_path}/x/bench"
        and config.tracker.kind == "none"
        and config.model.weights == "random"
    )
    # never reached: that one would be evaluated
    assert config.bench.all_steps == 3 + 5 + 2 + 2 and config.train.max_steps == 13
    assert (
        config.train.eval_interval is None
        and config.checkpoint.interval is None
        and config.train.profile.steps == 0
    )
    assert (
        config.optim.lr,
        config.optim.schedule,
        config.optim.warmup_steps,
        config.optim.betas,
    ) == (bench.LR, "constant", 0, [0.8, 0.9])
    assert bench.cell(config) == "tp2_dp2_64x2_acc2"
    config.bench.profile_steps = 0
    assert config.bench.all_steps == 8


@pytest.mark.parametrize("profiled", [True, False])
def test_the_clock(profiled: bool, tmp_path: Path) -> None:
    """The steps that are timed are those between warm-up and profiler, and then the loop is to
    stop.
    """
    config = tiny(tmp_path, bench={"warmup": 2, "steps": 3, "profile_steps": 1 if profiled else 0})
    begun: list[bool] = []
    clock = Clock(config, torch.device("cpu"), profiled, lambda: begun.append(True))
    hooks, marked = clock.hooks, []
    for step in range(1, 20):
        wishes = hooks.wishes()
        with torch.profiler.record_function(DATA):
            torch.ones(2).sum()
        hooks.stepped(step)
        marked.append(len(clock.marks))
        hooks.log(Evaluated(step, 0.0))
        if wishes & STOP:
            break
    clock.close()
    assert (
        step == (2 + 3 + 3 if profiled else 5)
        and marked[:5] == [0, 1, 2, 3, 4]
        and set(marked[5:]) <= {4}
    )
    assert begun == [True] and clock.peak_gib > 0
    seconds = clock.seconds()
    assert len(seconds) == 3 and all(each > 0 for each in seconds)
    if profiled:
        found = clock.trace(Store(str(tmp_path)), "profile/x.json.gz")
        assert found is not None and found["steps"] == 1 and (found["data_wait"] or 0) > 0
        with gzip.open(tmp_path / "profile" / "x.json.gz") as file:
            assert json.load(file)["traceEvents"]
    else:
        assert clock.profiler is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_on_a_gpu(tmp_path: Path) -> None:
    """The device's own times, and a trace of it as torch writes one: products, an optimizer step, a
    pause of the host.
    """
    clock = Clock(
        tiny(tmp_path, bench={"warmup": 1, "steps": 3, "profile_steps": 2}),
        torch.device("cuda"),
        True,
        lambda: None,
    )
    weight = torch.nn.Parameter(torch.randn(4096, 4096, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for step in range(1, clock.end + 1):
        with torch.profiler.record_function(DATA):
            rows = torch.randn(4096, 4096).to("cuda")
        (rows @ weight).square().mean().backward()
        optimizer.step()
        torch.cuda.synchronize()
        time.sleep(0.02)
        clock.hooks.stepped(step)
    clock.close()
    assert len(clock.seconds()) == 3 and min(clock.seconds()) > 0.02
    found = clock.trace(Store(str(tmp_path)), "profile/x.json.gz")
    assert found is not None and found["steps"] == 2 and found["other"] is None
    parts = {part: found[part] or 0 for part in PARTS}
    assert sum(parts.values()) == pytest.approx(found["step"])
    assert (
        parts["compute"] > 0
        and parts["optimizer"] > 0
        and parts["data_wait"] > 0
        and parts["host_gaps"] > 0.015
    )
    assert parts["exposed_communication"] == 0


def test_rates_and_environment(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallelism={"tp": 2, "dp": 2})
    found = rates(config, 10_000, 0.5, 1000, 1e12)
    assert (found["tokens_per_second"], found["tokens_per_second_per_gpu"]) == (2000, 500)
    assert found["mfu"] is not None and found["mfu_causal"] is not None
    assert found["mfu"] - found["mfu_causal"] == pytest.approx(500 * 6 * 3 * 64 * 64 / 1e12)
    assert rates(config, 10_000, 0.5, 1000, None)["mfu"] is None
    known = environment(config, torch.device("cpu"))
    assert (known["count"], known["threads"], known["torch"]) == (
        4,
        torch.get_num_threads(),
        torch.__version__,
    )
    config.seed, config.bench.steps, config.train.log_interval = 7, 3, 5
    assert environment(config, torch.device("cpu")) == known  # what doesn't touch the speed
    config.train.micro_batch_size = 9
    assert environment(config, torch.device("cpu"))["hash"] != known["hash"]


# --------------------------------------------------------------------------------------------------


def test_the_spread() -> None:
    assert bench.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3,
        "min": 1,
        "q1": 2,
        "q3": 4,
        "max": 5,
    }
    assert bench.spread([2.0]) == dict.fromkeys(("median", "min", "q1", "q3", "max"), 2.0)


def test_command_and_commit(tmp_path: Path) -> None:
    assert bench.command(["/somewhere/launch.py", "task=bench", "a='b c'"]).startswith(
        "python launch.py task=bench 'a="
    )
    assert bench.command(["/bin/tp-trainer", "task=bench"]) == "tp-trainer task=bench"

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert bench.commit(package) is None
    git("init", "-q")
    (package / "a.py").write_text("1")
    assert bench.commit(package) is None  # in a checkout, but none of it
    git("add", "-A")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")[:12]
    assert bench.commit(package) == head
    (package / "a.py").write_text("2")
    assert bench.commit(package) == f"{head}-dirty"


def test_lines_are_appended(tmp_path: Path) -> None:
    output = bench.writable(str(tmp_path / "new" / "bench.jsonl"))
    assert not Path(output).exists()  # a bench that is refused later leaves none
    rows: list[Any] = [{"number": 0}, {"number": 1}]
    for row in rows:
        bench.append(bench.writable(output), row)
    assert [json.loads(line)["number"] for line in Path(output).read_text().splitlines()] == [0, 1]
    remote = bench.writable("memory://benches/rows.jsonl")
    for row in rows:
        bench.append(remote, row)
    assert Store("memory://benches").read("rows.jsonl").decode() == '{"number": 0}\n{"number": 1}\n'


def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for typed, said in (
        ("bench.steps=0", "bench.steps=0: must be at least 1"),
        ("bench.warmup=0", "bench.warmup=0: must be at least 1"),
        ("bench.profile_steps=-1", "bench.profile_steps=-1: must be at least 0"),
        (f"bench.output={tmp_path}", f"bench.output={tmp_path}: can't be appended to"),
        ("bench.step=3", "bench.step=3: unknown key; did you mean bench.steps?"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["task=bench", typed])
        err = capsys.readouterr().err
        assert end.value.code == 2 and said in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_sweep_shows_tokens_per_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        bench,
        "run",
        lambda config: {"tokens_per_second_per_gpu": 1000.0 * config.train.micro_batch_size},
    )
    cli.main(["-m", "task=bench", "train.micro_batch_size=2,4", "hydra.sweep.dir=sweep"])
    out = capsys.readouterr().out
    assert (
        "tokens/s per worker" in out
        and "2,000" in out
        and "4,000" in out
        and "validation loss" not in out
    )
    assert json.loads((tmp_path / "sweep" / "1" / "job.json").read_text())["objective"] == -4000


@pytest.mark.matrix
def test_through_ray(tmp_path: Path) -> None:
    """A sweep of two, in a directory where a training run of the name lies: two lines, a table, and
    the run as it was.
    """
    before = {
        "metrics.jsonl": '{"step": 1}\n',
        "config.yaml": "seed: 1\n",
        "step_00000001/manifest.json": "{}",
    }
    for name, text in before.items():
        (tmp_path / "out" / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "mine" / name).write_text(text)
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "-m",
        "task=bench",
        "parallelism=tp2_dp1",
        "experiment_name=mine",
        "data=random",
        "model.overrides.num_hidden_layers=1",
        "data.seq_length=32",
        "train.micro_batch_size=2",
        "bench.warmup=1",
        "bench.steps=3",
        "bench.profile_steps=1,0",
        "cluster.device=cpu",
        f"checkpoint.storage_path={tmp_path / 'out'}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    one, two = (
        json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()
    )
    for row in (one, two):
        assert row["cell"] == "tp2_dp1_32x2" and (row["program"], row["model"], row["layers"]) == (
            "ours",
            "tiny",
            1,
        )
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["step_seconds"]["median"])
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2)
        assert row["timed_steps"] == 3 and row["mfu"] is None and row["peak_gib"] > 0
        assert row["command"].startswith("python launch.py -m task=bench parallelism=tp2_dp1")
        assert (
            tuple(row["startup_seconds"]) == bench.STAGES
            and min(row["startup_seconds"].values()) >= 0
        )
        assert row["environment"]["device"].endswith("CPU")
        assert (row["environment"]["count"], row["environment"]["compute"]) == (2, "float32")
        rate = f"{row['tokens_per_second_per_gpu']:,.0f}"
        # and in the sweep's table
        assert f"tokens/s    {rate} per worker" in done.stdout and re.search(
            rf"done +{rate} ", done.stdout
        )
    assert "bench.profile_steps=0" in done.stdout and "tokens/s per worker" in done.stdout
    assert (
        one["split"]["steps"] == 1
        and one["split"]["compute"] is None
        and two["split"] is two["trace"] is None
    )
    parts = [one["split"][part] for part in PARTS if one["split"][part] is not None]
    assert (
        sum(parts) == pytest.approx(one["split"]["step"])
        and one["split"]["optimizer"] > 0
        and one["split"]["data_wait"] > 0
    )
    with gzip.open(one["trace"]) as file:
        assert json.load(file)["traceEvents"]
    assert one["environment"]["hash"] == two["environment"]["hash"]
    run = tmp_path / "out" / "mine"
    assert {name: (run / name).read_text() for name in before} == before
    assert {path.name for path in run.iterdir()} == {
        "bench",
        "metrics.jsonl",
        "config.yaml",
        "step_00000001",
    }
    assert len(list((run / "bench" / "profile").iterdir())) == 1
    assert (
        not list((run / "bench").glob("step_*")) and not (run / "bench" / "metrics.jsonl").exists()
    )
