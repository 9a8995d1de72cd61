"""task=verify: the parity certificate. The chosen layout against plain transformers in one process,
step by step.

Both start from the same random weights and see the same batches, in the user's own layout,
precision and optimizer. Judged are, in float32, the loss and the gradient norm of every step and
every parameter's gradient at step 1 (later ones drift by rounding alone and are reported); in lower
precision the loss.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, TypedDict

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, architecture, load, plain
from tp_trainer.config.fields import with_depth
from tp_trainer.driver import RunFailed, fit_once, prepare, started
from tp_trainer.messages import Message, Start, StepCompared, VerifyResult


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """The relative differences that pass; None = not judged."""

    loss: float
    gradient_norm: float | None
    gradient_at_step_1: float | None


FULL, REDUCED = Tolerances(1e-6, 1e-5, 1e-5), Tolerances(2e-3, None, None)
# of real widths, whose sums are long: plain transformers in float32 is itself 1.6e-5 from float64
# (Llama-3-8B's, RESULTS.md)
FULL_ON_GPU = dataclasses.replace(FULL, gradient_at_step_1=5e-5)


class Certificate(TypedDict):
    """The contents of verify.json."""

    status: Literal["passed", "failed"]
    faults: list[str]
    tolerances: dict[str, float | None]  # `Tolerances`
    model: dict[str, Any]  # `config.Architecture`
    parallelism: dict[str, Any]
    seed: int
    changes: list[str]  # of the user's config
    dtypes: list[str]  # of compute and of gradient reduction
    device: str  # cpu or cuda
    steps: list[dict[str, Any]]  # `StepCompared`


def run(config: Config) -> Certificate:
    """Compare, print each step and the verdict, write verify.json.

    Raises:
        ConfigError: the family or the layout is refused.
        RunFailed: the numbers differ, or a worker failed.
    """
    outer = Store(config.run_dir)
    config, changes = shrunk(config)
    config, tokenizer, notice, store = prepare(config)
    numbers = architecture(config)

    def take(message: Message, age: float) -> None:
        if isinstance(message, StepCompared):
            print(line(message), flush=True)

    print(
        f"verify: {numbers.model_type}, {numbers.num_hidden_layers} layers of width"
        f" {numbers.hidden_size}, {config.parallelism.layout}; {config.verify.steps} steps of"
        f" {config.train.global_batch_size} x {config.data.seq_length} tokens"
    )
    for change in [*changes, notice or ""]:
        if change:
            print(f"  {change}")
    outer.remove("verify.json")  # of an earlier time
    with started(config, store) as owner:
        start = Start(owner.launch, tokenizer)
        result = fit_once(config, "tp_trainer.tasks.verify:work", start, store, take)
    assert isinstance(result, VerifyResult)
    tolerances = tolerances_for(config, result.dtypes, result.device)
    faults = judge(result.rows, tolerances)
    summary: Certificate = {
        "status": "failed" if faults else "passed",
        "faults": faults,
        "tolerances": dataclasses.asdict(tolerances),
        "model": dataclasses.asdict(numbers),
        "parallelism": plain(config)["parallelism"],
        "seed": config.seed,
        "changes": changes,
        "dtypes": result.dtypes,
        "device": result.device,
        "steps": [dataclasses.asdict(row) for row in result.rows],
    }
    outer.write_json("verify.json", summary)
    print(
        verdict(result, tolerances, faults),
        f"written to {outer.run_dir}/verify.json",
        sep="\n",
        flush=True,
    )
    if faults:
        raise RunFailed(f"verify: {faults[0]}")
    return summary


def shrunk(config: Config) -> tuple[Config, list[str]]:
    """The config of the compared run, and what it changes of the user's, a sentence each. Its files
    go to <run>/verify.
    """
    values, verify, changes = plain(config), config.verify, []
    fields, layers = values["model"]["architecture"], architecture(config).num_hidden_layers
    if verify.layers is not None and verify.layers < layers:
        fields = values["model"]["architecture"] = with_depth(fields, verify.layers)
        changes.append(f"layers: {verify.layers} of {layers} (verify.layers)")
    before = {key: value for key, value in fields.items() if re.search("dropout|pdrop", key)}
    fields.update(dict.fromkeys(before, 0.0))
    changed = ", ".join(f"{key} was {value}" for key, value in sorted(before.items()) if value)
    changes.append(f"dropout: all 0{f' ({changed})' if changed else ''}")
    changes.append(
        f"weights: random, of seed {config.seed}; learning rate: {verify.lr:g}, constant"
        " (verify.lr)"
    )
    values["model"] |= {"weights": "random", "overrides": {}}
    values["optim"] |= {
        "lr": verify.lr,
        "schedule": "constant",
        "warmup_steps": 0,
        "decay_steps": None,
    }
    values["train"] |= {"max_steps": verify.steps, "profile": {"steps": 0, "start": 0}}
    values["checkpoint"] |= {"storage_path": config.run_dir, "resume": "never"}
    values["cluster"]["max_failures"] = 0
    values["tracker"]["kind"] = "none"
    values["experiment_name"] = "verify"
    return load(values), changes


def work(config: Config, start: Start, progress: Any) -> VerifyResult:
    """What every rank runs, as worker.run does for training."""
    from tp_trainer.parallel.shard import dtypes
    from tp_trainer.recipe import build
    from tp_trainer.session import Rank
    from tp_trainer.tasks.parity import compared_steps

    rank = Rank(config)
    rank.agree(lambda: rank.check(config, start.launch))
    run = build(
        config,
        rank,
        tokenizer=start.tokenizer,
        lean=start.lean,
        built=lambda model: rank.push(progress, model.built),
    )
    rows = []
    with closing(run.model):
        for row in compared_steps(run, start.tokenizer):
            if row is not None:
                rows.append(row)
                progress.push.remote(row)
    compute, reduce = dtypes(config.parallelism, rank.device)
    names = [str(each).removeprefix("torch.") for each in (compute, reduce)]
    return VerifyResult(rows, rank.device.type, names)


# --------------------------------------------------------------------------------------------------


def tolerances_for(config: Config, dtypes: Sequence[str], device: str) -> Tolerances:
    """`dtypes`: of compute and of gradient reduction."""
    full = FULL_ON_GPU if device == "cuda" else FULL
    tolerances = full if set(dtypes) == {"float32"} and not config.parallelism.float8 else REDUCED
    return dataclasses.replace(tolerances, loss=config.verify.tolerance or tolerances.loss)


def judge(rows: Sequence[StepCompared], tolerances: Tolerances) -> list[str]:
    """What doesn't pass, a sentence each, the most telling first: gradients of step 1 before what
    follows from them.
    """
    faults = []
    if tolerances.gradient_at_step_1 is not None:
        off = {
            name: part
            for name, part in rows[0].gradients.items()
            if part > tolerances.gradient_at_step_1
        }
        faults += [
            f"step 1: the gradient of {placed(name)} differs by {part:.1e}, allowed is"
            f" {tolerances.gradient_at_step_1:.0e}"
            for name, part in sorted(off.items(), key=lambda item: -item[1])
        ]
    for row in rows:
        for pair, words, allowed in (
            (row.loss, "loss", tolerances.loss),
            (row.gradient_norm, "gradient norm", tolerances.gradient_norm),
        ):
            if allowed is not None and pair.difference > allowed:
                faults.append(
                    f"step {row.step}: the {words} differs by {pair.difference:.1e},"
                    f" allowed is {allowed:.0e}; the worst gradient there is that of"
                    f" {placed(worst(row.gradients)[0])}"
                )
        faults += [
            f"step {row.step}: {placed(name)} is replicated over tp and has drifted apart"
            for name in row.drifted
        ]
    return faults


def worst(differences: Mapping[str, float]) -> tuple[str, float]:
    return max(differences.items(), key=lambda item: item[1])


def placed(name: str) -> str:
    """A parameter's name with its layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return f"{name} ({f'layer {found[1]}' if found else 'outside the layers'})"


def line(row: StepCompared) -> str:
    """A step; after each number its relative difference from the reference."""
    loss, norm = row.loss, row.gradient_norm
    (gradient, off), (parameter, apart) = worst(row.gradients), worst(row.parameters)
    return (
        f"step {row.step:>3}  loss {loss.parallel:.6f} ({loss.difference:.1e})  "
        f"gradient norm {norm.parallel:.6f} ({norm.difference:.1e})  "
        f"worst gradient {gradient} ({off:.1e})  worst parameter {parameter} ({apart:.1e})"
    )


def verdict(result: VerifyResult, tolerances: Tolerances, faults: Sequence[str]) -> str:
    """The last lines."""
    words = {
        "loss": "loss",
        "gradient_norm": "gradient norm",
        "gradient_at_step_1": "each gradient at step 1",
    }
    rule = ", ".join(
        f"{words[key]} {f'<= {allowed:g}' if allowed is not None else 'not judged'}"
        for key, allowed in dataclasses.asdict(tolerances).items()
    )
    steps, dtypes = result.rows, "/".join(dict.fromkeys(result.dtypes))
    head = f"{'failed' if faults else 'passed'} on {result.device}, {dtypes}"
    seen = (
        f"worst seen: loss {max(row.loss.difference for row in steps):.1e}, "
        f"gradient norm {max(row.gradient_norm.difference for row in steps):.1e}, "
        f"gradient at step 1 {worst(steps[0].gradients)[1]:.1e}"
    )
    shown = [f"  {fault}" for fault in faults[:5]]
    more = [f"  and {len(faults) - 5} more"] if len(faults) > 5 else []
    return "\n".join([f"{head} (relative differences: {rule})", seen, *shown, *more])
