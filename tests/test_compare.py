"""benchmarks/compare.py: what the programs print, read; the table."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
SAID = (
    "torchtitan tp2_dp1_2048x4|x :: step: 12  loss: 12.2  grad_norm: 1.5  memory: 45.12GiB(32.3%) "
    " tps: 9,046  tflops: 430.1  mfu: 43.5%;step: 16  loss: 11.9  grad_norm: 1.4  memory:"
    " 45.30GiB(32.4%)  tps: 9,050  tflops: 430.3  mfu: 43.5%;\n"
)


@pytest.fixture(scope="module")
def compare() -> Any:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torchtitan(compare: Any) -> None:
    assert compare.parse_torchtitan(SAID) == {"tokens_per_second_per_gpu": 9048, "peak_gib": 45.30}
    failed = "torchtitan tp2 failed (124)\n[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n"
    with pytest.raises(
        compare.Failed, match=r"^\[rank0\]: torch\.OutOfMemoryError: CUDA out of memory\.$"
    ):
        compare.parse_torchtitan(failed)
    with pytest.raises(compare.Failed, match=r"failed \(124\)"):
        compare.parse_torchtitan("torchtitan tp2 failed (124)\n")


def test_the_tutorial(compare: Any) -> None:
    said = (
        'warning: {}\n{"model": "llama3_8b", "world": 2, "tp": 2, "batch": 4, "seq": 2048,'
        ' "step_s": 0.9, "tokens_per_s_per_gpu": 4551, "peak_gib": 70.1}\n'
    )
    assert compare.parse_tutorial(said) == {"tokens_per_second_per_gpu": 4551, "peak_gib": 70.1}
    with pytest.raises(compare.Failed, match=r"^RuntimeError: mixed torch\.Tensor and DTensor$"):
        compare.parse_tutorial("Traceback\nRuntimeError: mixed torch.Tensor and DTensor\n  more\n")
    with pytest.raises(compare.Failed, match="said nothing"):
        compare.parse_tutorial("")


def test_cells(compare: Any) -> None:
    assert (
        compare.Cell.of("tp2_dp4_8192x1") == (2, 4, 8192, 1, None)
        and str(compare.Cell(2, 4, 8192, 1)) == "tp2_dp4_8192x1"
    )
    with pytest.raises(argparse.ArgumentTypeError, match=r"e\.g\. tp2_dp1_2048x4"):
        compare.Cell.of("tp2_2048x4")


def test_the_table(compare: Any) -> None:
    def row(cell: str, program: str, rate: float, **more: Any) -> dict[str, Any]:
        return {
            "cell": cell,
            "program": program,
            "tokens_per_second_per_gpu": rate,
            "mfu": rate / 20000,
            "peak_gib": 50.0,
            **more,
        }

    # the median of the rounds
    rows = [
        row("a", "ours", 9000),
        row("a", "ours", 9200),
        row("a", "ours", 100),
        row("a", "torchtitan", 8000, loss_parallel=True),
        row("a", "torchtitan", 8200, loss_parallel=True),
        row("a", "torchtitan", 8150, loss_parallel=False),
        row("b", "ours", 5000),
        row("b", "tutorial", 2500),
    ]
    assert compare.table(rows).splitlines()[2:] == [
        "| a | 9,000 (45.0%, 50.0 GiB) | 8,150 (40.8%, 50.0 GiB) |  | 1.10 |  |",
        "| b | 5,000 (25.0%, 50.0 GiB) |  | 2,500 (12.5%, 50.0 GiB) |  | 2.00 |",
    ]


def test_a_program_that_fails_or_hangs_does_not_stop_the_rest(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchtitan.sh answers with loss parallel and fails without; tutorial.py hangs."""
    (tmp_path / "torchtitan.sh").write_text(
        "[ $GPUS = 4 ] && [ $LIMIT = 4 ] || exit 1\ncase $1 in *disable_loss*) echo Error: no;; "
        f"*) echo '{SAID.strip()}';; esac\n"
    )
    (tmp_path / "tutorial.py").write_text("import time\ntime.sleep(600)\n")
    results = tmp_path / "results.jsonl"
    arguments = [
        "--cells",
        "tp2_dp2_2048x4",
        "--programs",
        "tutorial",
        "torchtitan",
        "--limit",
        "4",
        "--commit",
        "abc",
        "--peers",
        str(tmp_path),
        "--results",
        str(results),
    ]
    assert compare.main(arguments) == 0
    out = capsys.readouterr().out
    assert "tp2_dp2_2048x4 tutorial, round 1: failed: not done within 4 s" in out
    assert "tp2_dp2_2048x4 torchtitan: failed with loss parallel off: Error: no" in out
    (row,) = [compare.json.loads(line) for line in results.read_text().splitlines()]
    assert {
        "date",
        "cell",
        "program",
        "tokens_per_second_per_gpu",
        "mfu",
        "peak_gib",
        "command",
        "commit",
    } <= set(row)
    assert (row["program"], row["loss_parallel"], row["commit"], row["peak_gib"]) == (
        "torchtitan",
        True,
        "abc",
        45.3,
    )
    assert out.splitlines()[-1].startswith("| tp2_dp2_2048x4 |  | 9,048 (")
