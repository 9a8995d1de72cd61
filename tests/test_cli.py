"""The command line: refusals as one line, dry run, sweeps and their table, saved configs. The
driver is a stand-in here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tp_trainer import cli
from tp_trainer.cli.mesh import draw_mesh
from tp_trainer.config import COMMAND, Config, ConfigError, Parallelism, load, to_yaml
from tp_trainer.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Ended:
    code: int
    out: str
    err: str


class RunFailed(Exception):
    """The stand-in's tp_trainer.driver.RunFailed."""


class Driver:
    """Stands in for tp_trainer.driver: remembers the configs that it was given, and does what `act`
    says.
    """

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.act: Any = lambda config: {"validation_loss": config.optim.lr * 100}

    def train(self, config: Config) -> dict[str, Any]:
        self.configs.append(config)
        return self.act(config)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    module = types.ModuleType("tp_trainer.driver")
    module.train = stand_in.train  # type: ignore[attr-defined]
    module.RunFailed = RunFailed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tp_trainer.driver", module)
    task = types.ModuleType("tp_trainer.tasks.train")
    task.run = stand_in.train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tp_trainer.tasks.train", task)
    return stand_in


@pytest.fixture
def launch(
    driver: Driver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """main() in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py"])

    def call(*argv: str) -> Ended:
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main(argv)
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


# --------------------------------------------------------------------------------------------------

BAD = [  # what is typed, and what its one line must name
    # keys, groups, options
    ("optim.lrr=1", "optim.lrr=1: unknown key; did you mean optim.lr?"),
    ("+optim.lrr=1", "optim.lrr=1: unknown key; did you mean optim.lr?"),
    ("+zzz=1", "zzz=1: unknown key"),
    ("tp=4", "tp=4: unknown key; did you mean parallelism.tp?"),
    ("batch_size=4", "did you mean train.micro_batch_size?"),
    ("train.warmup_steps=3", "did you mean optim.warmup_steps?"),
    ("lr=1", "did you mean optim.lr?"),
    ("foo.bar=1", "foo.bar=1: unknown key"),
    ("optim.lr.x=1", "optim.lr.x=1: unknown key; did you mean optim.lr?"),
    ("optim.zzz=1", "optim.zzz=1: unknown key; optim has: name, lr, weight_decay"),
    ("hydra.foo=1", "hydra.foo=1: unknown key"),
    ("~foo", "foo: unknown key"),
    ("~optim.lr", "optim.lr=null"),
    ("modle=tiny", "modle=tiny: unknown group; did you mean model? groups: model, parallelism"),
    ("model=qwen2_7", "model=qwen2_7: no such option; did you mean qwen2_7b? options: exaone4_"),
    ("parallelism=tp2_dp3", "parallelism=tp2_dp3: no such option; did you mean tp2_d"),
    ("experiment=tutorial", "experiment=tutorial: no such option; did you mean tutorial_qwen2_7b?"),
    ("hydra/launcher=joblob", "hydra/launcher=joblob: no such option"),
    ("optim=5", "optim=5: the name of an option is wanted; options: adamw"),
    ("optim=null", "optim=null: the name of an option is wanted; options: adamw"),
    ("+model=tiny", "without +: model=tiny"),
    ("++model=tiny", "without +: model=tiny"),
    ("model@foo=tiny", "type model=<option>"),
    ("=3", "=3: has no key"),
    # syntax
    ("optim.lr", "optim.lr: has no '='; type optim.lr=<value>"),
    ("optim.lr=(1", "optim.lr=(1: can't be read; quote the value: 'optim.lr=\"(1\"'"),
    ("data.name=a{b", "quote the value"),
    ("optim.betas[0]=0.8", "optim.betas[0]=0.8: is no key"),
    ("optim.lr=1,2", "optim.lr=1,2: one value is wanted"),
    ("optim.lr=range(1,3)", "-m (--multirun)"),
    ("--nonsense", "unrecognized arguments: --nonsense"),
    # types
    ("optim.lr=fast", "optim.lr=fast: must be a number"),
    ("seed=1.5", "seed=1.5: must be a whole number"),
    ("train.deterministic=maybe", "train.deterministic=maybe: must be true or false"),
    ("optim.betas=0.9", "optim.betas=0.9: must be a whole list"),
    ("optim.betas=[a,b]", "a: must be a number"),
    (
        "train.profile=1",
        "train.profile=1: is a group of keys, not a value; give train.profile.steps",
    ),
    ("cluster.env=[1]", "cluster.env=[1]: must be keys and values"),
    ("seed=${oc.env:SURELY_NOT_SET}", "Environment variable 'SURELY_NOT_SET' not found"),
    ("seed=${nothing}", "seed=${nothing}: Interpolation key 'nothing' not found"),
    # rules
    (
        "parallelism.tp=3",
        (
            "parallelism.tp=3: must divide the model's 8 heads and intermediate size 384, "
            "and divide or be a multiple of its 4 key/value heads; "
            "degrees that do: 1, 2, 4, 8"
        ),
    ),
    ("parallelism.tp=0", "parallelism.tp=0: must be at least 1"),
    (
        "parallelism.dp_replicate=3",
        "parallelism.dp_replicate=3: must divide parallelism.dp=2; allowed: 1, 2",
    ),
    ("cluster.num_workers=3", "cluster.num_workers=3: must be tp x dp = 2 x 2 = 4"),
    (
        "train.global_batch_size=12",
        (
            "train.global_batch_size=12: must be a multiple of train.micro_batch_size x"
            " parallelism.dp = 4 x 2 = 8"
        ),
    ),
    ("train.max_steps=0", "train.max_steps=0: must be at least 1"),
    ("data.percentage=0", "data.percentage=0: must be above 0 and at most 100"),
    ("data.percentage=101", "data.percentage=101: must be above 0 and at most 100"),
    ("optim.lr=-1", "optim.lr=-1: must be at least 0"),
    ("optim.lr=nan", "optim.lr=nan: must be"),
    ("optim.betas=[0.9,1.0]", "optim.betas=[0.9,1.0]: must be two numbers in [0, 1)"),
    (
        "optim.warmup_steps=11 train.max_steps=10",
        "optim.warmup_steps=11: longer than the run of 10 steps",
    ),
    ("data.seq_length=0", "data.seq_length=0: must be at least 1"),
    ("data.seq_length=2048", "data.seq_length=2048: the model has 1024 positions"),
    ("data.seq_length=127", "data.seq_length=127: must be divisible by parallelism.tp=2, e.g. 126"),
    (
        "optim.schedule=cosin",
        "optim.schedule=cosin: must be one of cosine, linear, constant, wsd; did you mean cosine?",
    ),
    ("cluster.device=tpu", "cluster.device=tpu: must be one of auto, cpu, gpu"),
    ("model.name=./nowhere", "model.name=./nowhere: no such directory"),
    ("data=jsonl", "data.name: is missing"),
    ("experiment_name=a/b", "experiment_name=a/b: must be one directory name"),
    # Hydra's flags
    ("--cfg job --multirun", "only one of"),
    ("--resolve", "--resolve goes with"),
    ("--config-path nowhere", "--config-path=nowhere: no such directory"),
    ("--config-path .", "--config-path=.: holds no config.yaml"),
    ("--config-dir nowhere", "--config-dir=nowhere: no such directory"),
    ("--config-name nowhere", "--config-name=nowhere: no nowhere.yaml"),
]


@pytest.mark.parametrize(("typed", "says"), BAD, ids=[typed for typed, _ in BAD])
def test_bad_input_is_one_line_and_2(
    typed: str, says: str, launch: Any, driver: Driver, tmp_path: Path
) -> None:
    start = time.thread_time()  # other tests' threads may go on beside
    ended = launch(*typed.split(" "))
    assert time.thread_time() - start < 2
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert says in ended.err
    assert ended.out == "" and not driver.configs and not list(tmp_path.iterdir())


def children_cpu_seconds() -> float:
    return sum(os.times()[2:4])


@pytest.mark.parametrize(
    ("typed", "says"),
    [("optim.lr=fast", "must be a number"), ("parallelism.tp=3", "degrees that do")],
)
def test_bad_input_from_the_shell(typed: str, says: str, tmp_path: Path) -> None:
    start = children_cpu_seconds()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), typed],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert children_cpu_seconds() - start < 2
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_fault_in_a_file_names_the_file(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "mine" / "optim").mkdir(parents=True)
    (tmp_path / "mine" / "optim" / "wrong.yaml").write_text("learning: 1\n")
    (tmp_path / "mine" / "optim" / "broken.yaml").write_text("lr: [1\n")
    (tmp_path / "mine" / "optim" / "fine.yaml").write_text("lr: 0.25\n")
    ended = launch("--config-dir", "mine", "optim=wrong")
    assert (
        ended.code == 2
        and "optim.learning: unknown key" in ended.err
        and "(in optim/wrong.yaml)" in ended.err
    )
    ended = launch("--config-dir", "mine", "optim=broken")
    assert ended.code == 2 and "broken.yaml" in ended.err and ended.err.count("\n") == 1
    assert launch("--config-dir", "mine", "optim=fine").code == 0


# --------------------------------------------------------------------------------------------------


def test_importing_the_command_line_brings_neither_torch_nor_ray() -> None:
    heavy = (
        "[m for m in ('torch', 'ray', 'transformers', 'datasets', 'huggingface_hub') if m in"
        " sys.modules]"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, tp_trainer.cli, tp_trainer.tasks; print({heavy})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_task_is_an_entry_of_the_table_and_a_file() -> None:
    """The schema, which can't know the table, lets through what it names and nothing else."""
    (allowed,) = (each.metadata["one_of"] for each in fields(Config) if each.name == "task")
    assert set(allowed) == set(TASKS)
    for task in TASKS.values():
        source = importlib.util.find_spec(task.module)
        assert source is not None and source.origin is not None, task.module
        tree = ast.parse(Path(source.origin).read_text())
        assert "run" in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_a_run_gets_a_checked_config_and_leaves_no_files(
    launch: Any, driver: Driver, tmp_path: Path
) -> None:
    ended = launch("optim.lr=1e-2", "train.max_steps=5")
    assert (ended.code, ended.err) == (0, "")
    (config,) = driver.configs
    assert (config.optim.lr, config.train.max_steps, config.model.weights) == (1e-2, 5, "random")
    assert config.checkpoint.storage_path == str(tmp_path / "outputs")
    assert not list(tmp_path.iterdir())


def test_open_dictionaries_take_plain_keys(launch: Any, driver: Driver) -> None:
    assert (
        launch(
            "model.overrides.num_hidden_layers=2", "cluster.env.FOO=1", "+cluster.env.BAR=x"
        ).code
        == 0
    )
    assert launch("cluster.env={FOO: 1}").code == 0
    assert driver.configs[0].model.architecture["num_hidden_layers"] == 2
    assert driver.configs[0].cluster.env == {"FOO": "1", "BAR": "x"}
    assert driver.configs[1].cluster.env == {"FOO": "1"}


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            ConfigError("cluster.device", "gpu", "no GPU here"),
            2,
            "error: cluster.device=gpu: no GPU here\n",
        ),
        (RunFailed("worker 3 died"), 1, "error: worker 3 died\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, line: str, launch: Any, driver: Driver
) -> None:
    def act(config: Config) -> dict[str, Any]:
        raise raised

    driver.act = act
    ended = launch()
    assert (ended.code, ended.err) == (code, line)


def test_what_nobody_foresaw_shows_its_traceback(launch: Any, driver: Driver) -> None:
    driver.act = lambda config: 1 / 0
    ended = launch()
    assert ended.code == 1 and "ZeroDivisionError" in ended.err and "Traceback" in ended.err


def test_dry_run(launch: Any, driver: Driver, tmp_path: Path) -> None:
    ended = launch(
        "dry_run=true", "cluster.env.SECRET=swordfish", "model.overrides.num_hidden_layers=2"
    )
    assert ended.code == 0 and not driver.configs and not list(tmp_path.iterdir())
    assert "num_hidden_layers: 2\n" in ended.out and "lr: 0.003" in ended.out
    assert "TP group {0, 1}" in ended.out and "DP group of tp 1: {1, 3}" in ended.out
    assert "SECRET" in ended.out and "swordfish" not in ended.out


def test_the_mesh_drawn() -> None:
    assert draw_mesh(Parallelism(tp=4, dp=2)).splitlines() == [
        "mesh (dp=2, tp=4): 8 workers",
        "",
        "        tp 0  tp 1  tp 2  tp 3",
        "dp 0       0     1     2     3    TP group {0, 1, 2, 3}",
        "dp 1       4     5     6     7    TP group {4, 5, 6, 7}",
        "",
        "DP group of tp 0: {0, 4}",
        "DP group of tp 1: {1, 5}",
        "DP group of tp 2: {2, 6}",
        "DP group of tp 3: {3, 7}",
    ]
    hybrid = draw_mesh(Parallelism(tp=2, dp=4, dp_replicate=2))
    assert hybrid.startswith("mesh (dp_replicate=2, dp=2, tp=2): 8 workers")
    assert "replica 1, dp 0" in hybrid
    assert (
        "DP group of tp 0: {0, 2, 4, 6}, sharded over {0, 2} and {4, 6}, replicated across them"
        in hybrid
    )


def test_hydras_own_flags(launch: Any, driver: Driver) -> None:
    shown = launch("--cfg", "job", "--package", "optim", "optim.lr=0.5")
    assert shown.code == 0 and "lr: 0.5" in shown.out
    helped = launch("--help")
    assert (
        helped.code == 0
        and "model: exaone4_1_2b, " in helped.out
        and "experiment: tutorial_qwen2_7b" in helped.out
    )
    for task in TASKS.values():
        assert f"\n{task.name}: {task.help}" in helped.out
    assert "jobs of" not in launch("-m", "seed=1,2", "--help").out
    assert launch("--info", "searchpath").code == 0
    assert launch("--hydra-help").code == 0
    assert not driver.configs


def test_shell_completion(tmp_path: Path) -> None:
    env = {**os.environ, "COMP_LINE": "python launch.py model=qwen3", "COMP_POINT": "28"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "-sc", "query=bash"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        f"model=qwen3_{size}" for size in ("0_6b", "14b", "1_7b", "32b", "4b", "8b")
    ], done.stderr


# --------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, config: Config) -> Path:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def test_a_saved_config_runs_again_with_overrides(
    launch: Any, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(
        "optim.lr=0.01",
        "model.overrides.num_hidden_layers=2",
        "optim.betas=[0.8,0.9]",
        "cluster.env.FOO=it",
    )
    first = driver.configs[0]
    run = saved(tmp_path, first)
    # may be a secret
    assert "it" not in (run / "config.yaml").read_text().split("FOO:")[1].split("\n")[0]
    monkeypatch.setenv("FOO", "it")
    assert launch("--config-path", "run").code == 0
    assert driver.configs[1] == first
    assert (
        launch(
            "--config-path",
            str(run),
            "parallelism.tp=1",
            "train.max_steps=7",
            "experiment_name=again",
        ).code
        == 0
    )
    assert driver.configs[2].cluster.num_workers == 2  # derived anew
    assert driver.configs[2].train.max_steps == 7 and driver.configs[2].optim.lr == 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    monkeypatch.delenv("FOO")
    ended = launch("--config-path", "run")
    assert ended.code == 2 and "cluster.env.FOO: Environment variable 'FOO' not found" in ended.err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optim.lr=fast", "must be a number"),
        ("parallelism=tp1_dp9", "parallelism=tp1_dp9: no such option; did you mean tp1_dp"),
        ("parallelism=null", "the name of an option is wanted"),
        (
            "model=qwen3_8b",
            (
                "model=qwen3_8b: the saved config in --config-path has all of its keys, and the two"
                " would mix; give single"
            ),
        ),
        (
            "data=random",
            "e.g. data.source=<source> data.name=<name>, or choose it without --config-path",
        ),
        (
            "experiment=tutorial_qwen2_7b",
            "experiment=tutorial_qwen2_7b: the saved config in --config-path has all",
        ),
        ("+model=tiny", "model=tiny: the saved config"),
    ],
)
def test_a_saved_config_is_checked_by_the_same_schema(
    typed: str, says: str, launch: Any, tmp_path: Path
) -> None:
    saved(tmp_path, load({"model": {"architecture": TINY}}))
    ended = launch("--config-path", "run", typed)
    assert ended.code == 2 and says in ended.err and ended.err.count("\n") == 1


def test_groups_go_over_a_saved_config(launch: Any, driver: Driver, tmp_path: Path) -> None:
    """What an option states wins over what was saved; a single key wins over both."""
    launch(
        "optim.lr=0.01",
        "parallelism.activation_checkpointing=full",
        "train.max_steps=9",
        "cluster.device=cpu",
        "tracker.project=it",
    )
    run = saved(tmp_path, driver.configs[0])
    ended = launch(
        "--config-path",
        "run",
        "parallelism=tp1_dp4",
        "tracker=none",
        "optim=adamw",
        "train=default",
        "checkpoint=default",
    )
    assert (ended.code, ended.err) == (0, ""), ended
    config = driver.configs[1]
    assert (
        config.parallelism.layout,
        config.parallelism.activation_checkpointing,
        config.cluster.num_workers,
    ) == ("tp1_dp4", "full", 4)
    assert (
        config.tracker.kind,
        config.tracker.project,
        config.optim.lr,
        config.train.max_steps,
    ) == ("none", "it", 0.01, 9)
    assert (
        config.experiment_name == driver.configs[0].experiment_name
        and config.cluster.device == "cpu"
    )
    assert (
        launch(
            "--config-path", str(run), "parallelism.dp=1", "parallelism=tp4_dp2", "cluster=ray"
        ).code
        == 0
    )
    assert (driver.configs[2].parallelism.layout, driver.configs[2].cluster.kind) == (
        "tp4_dp1",
        "ray",
    )
    assert driver.configs[2].cluster.device == "auto", (
        "of another cluster nothing has been found yet"
    )
    assert (
        launch(
            "--config-path",
            "run",
            "-m",
            "parallelism=tp1_dp2,tp2_dp1",
            "seed=1",
            "experiment_name=cmp-${hydra:runtime.choices.parallelism}",
            "hydra.sweep.dir=sweep",
        ).code
        == 0
    )
    assert [config.parallelism.layout for config in driver.configs[3:]] == ["tp1_dp2", "tp2_dp1"]


def test_a_run_that_was_moved_runs_where_it_is(launch: Any, driver: Driver, tmp_path: Path) -> None:
    launch("experiment_name=first", "optim.lr=0.01", f"checkpoint.storage_path={tmp_path}/old")
    run = saved(tmp_path, driver.configs[0])
    (run / "step_00000004").mkdir()
    line = f"{run} was {tmp_path}/old/first when it was saved (moved or copied since): "
    place = f"experiment_name=run, checkpoint.storage_path={tmp_path}\n"

    def where(*typed: str) -> tuple[str, str]:
        ended = launch("--config-path", "run", *typed)
        assert (ended.code, ended.err) == (0, ""), ended
        return driver.configs[-1].run_dir, ended.out

    assert where() == (str(run), line + place)
    assert where("optim.lr=0.02", "cluster=kuberay") == (
        str(run),
        line + place,
    ), "wherever a cluster keeps its runs"
    assert where("experiment_name=branch") == (
        f"{tmp_path}/branch",
        line + f"checkpoint.storage_path={tmp_path}\n",
    )
    assert where(f"checkpoint.storage_path={tmp_path}/x") == (
        f"{tmp_path}/x/run",
        line + "experiment_name=run\n",
    )
    assert where("experiment_name=a", "checkpoint.storage_path=/b") == ("/b/a", "")
    (tmp_path / "old").mkdir()
    run.rename(tmp_path / "old" / "first")
    (tmp_path / "run").symlink_to(tmp_path / "old" / "first")
    assert where() == (f"{tmp_path}/old/first", ""), "a link to where it was"


def test_a_copied_config_is_not_a_run_that_was_moved(
    launch: Any, driver: Driver, tmp_path: Path
) -> None:
    launch("experiment_name=first", f"checkpoint.storage_path={tmp_path}/old")
    run = saved(tmp_path, driver.configs[0])
    assert (
        launch("--config-path", "run").out == ""
        and driver.configs[1].run_dir == f"{tmp_path}/old/first"
    )
    (run / "metrics.jsonl").write_text("")
    assert launch("--config-path", "run").code == 0 and driver.configs[2].run_dir == str(run), (
        "there is nothing where it was"
    )
    (tmp_path / "old" / "first").mkdir(parents=True)
    assert (
        launch("--config-path", "run").code == 0
        and driver.configs[3].run_dir == f"{tmp_path}/old/first"
    )


def test_a_run_that_began_with_never_goes_on(launch: Any, driver: Driver, tmp_path: Path) -> None:
    launch("experiment_name=run", "checkpoint.resume=never", f"checkpoint.storage_path={tmp_path}")
    run = saved(tmp_path, driver.configs[0])
    assert (
        launch("--config-path", "run").code == 0 and driver.configs[1].checkpoint.resume == "auto"
    )
    text = (run / "config.yaml").read_text()
    # as earlier releases wrote it
    (run / "config.yaml").write_text(text.replace("resume: auto", "resume: never"))
    (run / "step_00000004").mkdir()
    ended = launch("--config-path", "run")
    assert (
        driver.configs[2].checkpoint.resume == "auto"
        and "was started with checkpoint.resume=never; here auto" in ended.out
    )
    assert (
        launch("--config-path", "run", "checkpoint.resume=never").out == ""
        and driver.configs[3].checkpoint.resume == "never"
    )


def test_a_saved_config_with_a_foreign_key_is_refused(launch: Any, tmp_path: Path) -> None:
    run = saved(tmp_path, load({"model": {"architecture": TINY}}))
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("weight_decay:", "weight_decoy:")
    )
    ended = launch("--config-path", "run")
    assert (
        ended.code == 2
        and "optim.weight_decoy: unknown key; did you mean optim.weight_decay? (in config.yaml)"
        in ended.err
    )


def test_config_dir_of_a_run_is_refused(launch: Any, driver: Driver, tmp_path: Path) -> None:
    saved(tmp_path, load({"model": {"architecture": TINY}}))
    ended = launch("--config-dir", "run", "--config-name", "config")
    assert ended.code == 2 and "--config-path run" in ended.err and not driver.configs


TINY = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


# ------------------------------------------------------------------------------------------- the co


def commands(driver: Driver, launch: Any, *argv: str) -> list[list[str]]:
    """The words of the command that each job was started with."""
    seen: list[list[str]] = []

    def act(config: Config) -> dict[str, Any]:
        seen.append(json.loads(os.environ[COMMAND]))
        return {"validation_loss": 1.0}

    driver.act = act
    assert launch(*argv).code == 0
    return seen


def test_the_command_that_goes_on(
    launch: Any, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [
        "parallelism=tp1_dp4",
        "model.overrides.num_hidden_layers=2",
        "checkpoint.resume=never",
        "data.name=null",
    ]
    assert commands(driver, launch, *typed) == [["python", "launch.py", *typed]]
    secret = ["cluster.env.KEY=swordfish", "cluster.env.OTHER=${oc.env:HOME}"]
    (words,) = commands(driver, launch, *secret, "seed=1")
    assert words[2:] == [
        "seed=1",
        "cluster.env.KEY=${oc.env:KEY}",
        "cluster.env.OTHER=${oc.env:OTHER}",
    ]
    assert commands(driver, launch, "cluster.env={KEY: swordfish}")[0][2:] == [
        "cluster.env.KEY=${oc.env:KEY}"
    ]
    run = saved(tmp_path, load({"model": {"architecture": TINY}}))
    flags = ["--config-path", str(run)]
    (words,) = commands(driver, launch, "--config-path", "run", "parallelism=tp1_dp2")
    assert words == ["python", "launch.py", *flags, "parallelism=tp1_dp2"]
    assert launch(*flags, "parallelism=tp1_dp2").code == 0, "and it is one"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tp-trainer"])
    assert commands(driver, launch) == [["tp-trainer"]]


def test_the_command_of_a_job_of_a_sweep(launch: Any, driver: Driver, tmp_path: Path) -> None:
    seen = commands(
        driver,
        launch,
        "-m",
        "seed=1,2",
        "experiment_name=job-${hydra:job.num}",
        "hydra.sweep.dir=sweep",
    )
    assert [words[2:] for words in seen] == [
        ["seed=1", "experiment_name=job-0"],
        ["seed=2", "experiment_name=job-1"],
    ]


# --------------------------------------------------------------------------------------------------


def reports(sweep: Path) -> list[dict[str, Any]]:
    return sorted(
        (json.loads(path.read_text()) for path in sweep.glob("*/job.json")),
        key=lambda job: job["number"],
    )


def test_a_sweep_ends_with_its_table(launch: Any, driver: Driver, tmp_path: Path) -> None:
    ended = launch(
        "-m", "optim.lr=1e-3,3e-3", "parallelism=tp2_dp2,tp1_dp4", "seed=1", "hydra.sweep.dir=sweep"
    )
    assert ended.code == 0, ended.err
    assert [(config.optim.lr, config.parallelism.layout) for config in driver.configs] == [
        (1e-3, "tp2_dp2"),
        (1e-3, "tp1_dp4"),
        (3e-3, "tp2_dp2"),
        (3e-3, "tp1_dp4"),
    ]
    jobs = reports(tmp_path / "sweep")
    assert [job["objective"] for job in jobs] == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert [job["run_dir"] for job in jobs] == [config.run_dir for config in driver.configs]
    table = ended.out[ended.out.index("4 jobs of") :]
    for job in jobs:
        (row,) = [line for line in table.splitlines() if job["run_dir"] in line]
        assert (
            row.split()[0] == str(job["number"])
            and "done" in row
            and f"{job['objective']:.4f}" in row
        )
    assert "parallelism=tp1_dp4" in table and "seed=1" not in table  # only what varied


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (
            "experiment_name=cmp parallelism=tp1_dp1,tp1_dp2",
            "cmp-${hydra:runtime.choices.parallelism}",
        ),
        (
            "parallelism.reshard_after_forward=true,false",
            "tiny-embedded-${parallelism.reshard_after_forward}",
        ),
        ("train.max_steps=5,7", "tiny-embedded-${train.max_steps}"),
        ("seed=1,2,1", "tiny-embedded-${hydra:job.num}"),
        ("seed=1,1", "tiny-embedded-${hydra:job.num}"),
        ("experiment_name=a optim.lr=1e-3,2e-3 seed=1,2", "a-${optim.lr}-${seed}"),
        ("experiment_name=a-${seed} optim.lr=1e-3,2e-3 seed=1,2", "a-1-${optim.lr}-${seed}"),
        ("experiment_name=a train.log_interval=5,7", "a-${train.log_interval}"),
        ("experiment_name=a tracker.project=x/y,x", "a-${hydra:job.num}"),
    ],
)
def test_a_sweep_whose_jobs_would_share_a_run(
    overrides: str, name: str, launch: Any, driver: Driver
) -> None:
    """The name that is to be typed is one that works."""
    sweep = ("-m", *overrides.split(), "hydra.sweep.dir=sweep")
    ended = launch(*sweep)
    assert ended.code == 2 and not driver.configs, ended
    assert f"; type 'experiment_name={name}'" in ended.err and ended.err.count("\n") == 1
    named = [each for each in sweep if not each.startswith("experiment_name")]
    ended = launch(*named, f"experiment_name={name}")
    assert ended.code == 0, ended
    assert len({config.run_dir for config in driver.configs}) == len(driver.configs) > 1


def test_jobs_that_start_no_run_share_none(launch: Any, driver: Driver) -> None:
    for each in ("dry_run=true", "task=bench"):
        ended = launch("-m", "train.log_interval=5,7", each)
        assert "2 jobs of" in ended.out and "would share" not in ended.err, ended


@pytest.mark.parametrize(
    ("typed", "arrives"),
    [
        ("experiment_name=2026_11_26", "2026_11_26"),
        ("experiment_name=1e3", "1e3"),
        ("experiment_name=true", "true"),
        ("experiment_name=007", "007"),
        ("++experiment_name=1_0", "1_0"),
        ("experiment_name='1_0'", "1_0"),
        ("data.text_column=1.10", "1.10"),
        ("data.text_column=nan", "nan"),
        ("cluster.env.FLAG=true", "true"),
        ("cluster.env.VERSION=1.10", "1.10"),
        ("+cluster.env.VERSION=1.10", "1.10"),
        ("cluster.env={VERSION: '1.10', N: 5}", "1.10"),
        ("experiment_name=${data.text_column}-1", "text-1"),
    ],
)
@pytest.mark.parametrize("sweep", [False, True])
def test_text_arrives_as_it_was_typed(
    typed: str, arrives: str, sweep: bool, launch: Any, driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"1.10": "x", "nan": "x", "text": "x"}\n')
    many = ("-m", "optim.lr=1e-3", "hydra.sweep.dir=sweep") if sweep else ()
    ended = launch(typed, *many, "data.name=a.jsonl")
    assert ended.code == 0 and ended.err == "", ended
    (config,) = driver.configs
    value: Any = config
    for part in typed.partition("=")[0].lstrip("+").split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert (value["VERSION"] if isinstance(value, dict) else value) == arrives


def test_what_is_no_text_stays_typed(launch: Any, driver: Driver) -> None:
    assert launch("model.overrides.rope_theta=1e6", "experiment_name=null", "seed=0x10").code == 2
    assert launch("model.overrides.rope_theta=1e6", "experiment_name=null").code == 0
    assert driver.configs[0].model.architecture["rope_parameters"]["rope_theta"] == 1e6
    assert driver.configs[0].experiment_name.startswith("tiny-")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "-m experiment_name=2026_11_26,b",
            "2026_11_26 would be read as 20261126, and this is a key of text;"
            " type \"experiment_name='2026_11_26','b'\"",
        ),
        ("-m data.text_column=choice(1.10,b)", "type \"data.text_column='1.10','b'\""),
        ("-m cluster.env.FLAG=true,false", "type \"cluster.env.FLAG='true','false'\""),
        ("cluster.env={VERSION:1.10}", "quote it there: VERSION: '1.10'"),
        ("cluster.env={A:x,FLAG:true}", "quote it there: FLAG: 'true'"),
        ("checkpoint.allow_mismatch=[1.10]", "quote it there: '1.10'"),
    ],
)
def test_text_that_would_be_lost_is_refused(
    overrides: str, says: str, launch: Any, driver: Driver
) -> None:
    ended = launch(*overrides.split(), "hydra.sweep.dir=sweep")
    assert ended.code == 2 and says in ended.err and not driver.configs, ended
    if (typed := re.search(r'type "(.*)"$', ended.err.strip())) is not None:
        ended = launch("-m", typed[1], "hydra.sweep.dir=sweep")
        assert "would be read as" not in ended.err, ended


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("experiment_name: 2026_11_26", "quote it in {}: experiment_name: '2026_11_26'"),
        ("data:\n  text_column: 1.10", "quote it in {}: text_column: '1.10'"),
        ("cluster:\n  env:\n    FLAG: yes", "quote it in {}: FLAG: 'yes'"),
        (
            "hydra:\n  sweeper:\n    params:\n      experiment_name: 1_0",
            "quote it in {}: experiment_name: '1_0'",
        ),
    ],
)
def test_text_of_a_file_that_would_be_lost_is_refused(
    content: str, says: str, launch: Any, driver: Driver, tmp_path: Path
) -> None:
    path = tmp_path / "own" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    own = ("--config-dir", "own", "experiment=mine")
    for text in (content, re.sub(r": (\S+)$", r": '\1'", content)):
        path.write_text(f"# @package _global_\n{text}\n")
        for more in ((), ("-m", "seed=1", "hydra.sweep.dir=sweep")):
            ended = launch(*own, *more)
            if text == content:
                assert ended.code == 2 and says.format(path) in ended.err, ended
                assert not driver.configs
            else:
                assert "would be read as" not in ended.err, ended


def test_where_a_sweep_goes_by_default(launch: Any, tmp_path: Path) -> None:
    assert launch("--multirun", "seed=1,2").code == 0
    assert [
        path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("multirun/*/*/*/job.json")
    ] == ["multirun"] * 2


def test_a_job_that_breaks_a_rule_is_reported_and_the_rest_run(
    launch: Any, driver: Driver, tmp_path: Path
) -> None:
    ended = launch("-m", "parallelism.tp=1,3,2", "hydra.sweep.dir=sweep")
    assert ended.code == 1
    assert [config.parallelism.tp for config in driver.configs] == [1, 2]
    assert [job["status"] for job in reports(tmp_path / "sweep")] == ["done", "refused", "done"]
    assert (
        "error: job 1: parallelism.tp=3: must divide" in ended.err and "Traceback" not in ended.err
    )


def test_a_job_that_fails_lets_the_rest_run(launch: Any, driver: Driver, tmp_path: Path) -> None:
    def act(config: Config) -> dict[str, Any]:
        if config.seed == 1:
            raise RunFailed("worker 3 died")
        if config.seed == 2:
            raise ZeroDivisionError
        return {"validation_loss": 1.5}

    driver.act = act
    ended = launch("-m", "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert ended.code == 1 and len(driver.configs) == 3
    assert [(job["status"], job["objective"]) for job in reports(tmp_path / "sweep")] == [
        ("failed", None),
        ("failed", None),
        ("done", 1.5),
    ]
    assert (
        "error: job 0: worker 3 died" in ended.err
        and "error: job 1: ZeroDivisionError" in ended.err
    )


def test_a_sweep_that_is_stopped_has_its_table(launch: Any, driver: Driver, tmp_path: Path) -> None:
    def act(config: Config) -> dict[str, Any]:
        if config.seed == 2:
            raise KeyboardInterrupt
        return {"validation_loss": 1.5}

    driver.act = act
    ended = launch("-m", "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert ended.code == 130 and len(driver.configs) == 2
    assert [job["status"] for job in reports(tmp_path / "sweep")] == ["done", "interrupted"]
    assert "2 jobs of" in ended.out


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("model=tiny,tinny", "model=tinny: no such option; did you mean tiny?"),
        ("optim.lr=1e-3,fast", "optim.lr=fast: must be a number"),
        ("optim.lrr=1,2", "did you mean optim.lr?"),
        ("optim.lr=interval(0,1)", "optim.lr=interval(0,1): needs another sweeper"),
        ("optim.lr=1,,", "can't be read"),
        ("hydra.verbose=true,false", "hydra.verbose=true,false"),
    ],
)
def test_a_sweep_with_a_job_that_does_not_compose_ends_before_its_first(
    typed: str, says: str, launch: Any, driver: Driver, tmp_path: Path
) -> None:
    ended = launch("-m", "seed=1,2", typed, "hydra.sweep.dir=sweep")
    assert ended.code == 2 and says in ended.err and ended.err.count("\n") == 1
    assert not driver.configs and not (tmp_path / "sweep").exists()


def test_a_sweep_may_live_in_the_config(launch: Any, driver: Driver, tmp_path: Path) -> None:
    config = load({"model": {"architecture": TINY}})
    run = saved(tmp_path, config)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace(
            "hydra:\n", "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n"
        )
    )
    sweep = ("--config-path", "run", "hydra.sweep.dir=sweep")
    refused, name = launch(*sweep), f"{config.experiment_name}-${{seed}}"
    assert refused.code == 2 and f"type 'experiment_name={name}'" in refused.err, refused
    assert launch(*sweep, f"experiment_name={name}").code == 0
    assert [config.seed for config in driver.configs] == [1, 2]


def test_reports_of_an_older_sweep_do_not_count(
    launch: Any, driver: Driver, tmp_path: Path
) -> None:
    assert launch("-m", "parallelism.tp=1,2,3", "hydra.sweep.dir=sweep").code == 1
    ended = launch("-m", "seed=1,2", "hydra.sweep.dir=sweep")
    assert ended.code == 0 and "2 jobs of" in ended.out


def test_jobs_may_use_their_number(launch: Any, driver: Driver) -> None:
    assert launch("-m", "seed=1,2", "experiment_name=job-${hydra:job.num}").code == 0
    assert [config.experiment_name for config in driver.configs] == ["job-0", "job-1"]


def test_what_comes_from_the_environment_stays_out_of_reports(
    launch: Any, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "swordfish")
    ended = launch("-m", "seed=1,2", "cluster.env.TOKEN=${oc.env:TOKEN}", "hydra.sweep.dir=sweep")
    assert [config.cluster.env for config in driver.configs] == [{"TOKEN": "swordfish"}] * 2
    assert "swordfish" not in ended.out + ended.err
    assert not any(
        "swordfish" in path.read_text()
        for path in (tmp_path / "sweep").glob("**/*")
        if path.is_file()
    )


def test_another_launcher_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "random.py").write_text("raise RuntimeError('shadowed')\n")
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "-m",
        "hydra/launcher=joblib",
        "dry_run=true",
        "parallelism.tp=1,3",
    ]
    done = subprocess.run(
        [*command, "hydra.sweep.dir=sweep"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert [job["status"] for job in reports(tmp_path / "sweep")] == ["done", "refused"]
