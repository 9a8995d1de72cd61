"""task=verify: the parity certificate. The chosen layout against plain transformers in one process, step by step.

Both start from the same random weights and see the same batches, in the user's own layout, precision and optimizer.
Judged are, in float32, the loss and the gradient norm of every step and every parameter's gradient at step 1 (later ones
drift by rounding alone and are reported); in lower precision the loss.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, architecture, load, plain
from tp_trainer.driver import RunFailed, failure, fit, prepare, started


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """The relative differences that pass; None = not judged."""

    loss: float
    gradient_norm: float | None
    gradient_at_step_1: float | None


FULL, REDUCED = Tolerances(1e-6, 1e-5, 1e-5), Tolerances(2e-3, None, None)
# of real widths, whose sums are long: plain transformers in float32 is itself 1.6e-5 from float64 (Llama-3-8B's, RESULTS.md)
FULL_ON_GPU = dataclasses.replace(FULL, gradient_at_step_1=5e-5)


def run(config: Config) -> dict[str, Any]:
    """Compare, print each step and the verdict, write verify.json. Returns its contents.

    Raises:
        ConfigError: the family or the layout is refused.
        RunFailed: the numbers differ, or a worker failed.
    """
    outer = Store(config.run_dir)
    config, changes = shrunk(config)
    config, tokenizer, notice, store = prepare(config)
    numbers = architecture(config)
    rows: list[dict[str, Any]] = []

    def take(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), flush=True)

    print(f"verify: {numbers.model_type}, {numbers.num_hidden_layers} layers of width {numbers.hidden_size}, {config.parallelism.layout}; "
          f"{config.verify.steps} steps of {config.train.global_batch_size} x {config.data.seq_length} tokens")  # fmt: skip
    for change in [*changes, notice or ""]:
        if change:
            print(f"  {change}")
    outer.remove("verify.json")  # of an earlier time
    with started(config, store) as owner:
        error, result = fit(config, "tp_trainer.tasks.verify:work", {"launch": owner.launch, "tokenizer": tokenizer}, store, take)
    if error is not None:
        raise RunFailed(failure(error, store))
    assert result is not None
    rows = result["rows"]
    tolerances = tolerances_for(config, result["dtypes"], result["device"])
    faults = judge(rows, tolerances)
    summary = {
        "status": "failed" if faults else "passed", "faults": faults, "tolerances": dataclasses.asdict(tolerances),
        "model": dataclasses.asdict(numbers), "parallelism": plain(config)["parallelism"], "seed": config.seed, "changes": changes,
        "dtypes": result["dtypes"], "device": result["device"], "steps": rows,
    }  # fmt: skip
    outer.write_json("verify.json", summary)
    print(verdict(summary), f"written to {outer.run_dir}/verify.json", sep="\n", flush=True)
    if faults:
        raise RunFailed(f"verify: {faults[0]}")
    return summary


def shrunk(config: Config) -> tuple[Config, list[str]]:
    """The config of the compared run, and what it changes of the user's, a sentence each. Its files go to <run>/verify."""
    values, verify, changes = plain(config), config.verify, []
    fields, layers = values["model"]["architecture"], architecture(config).num_hidden_layers
    if verify.layers is not None and verify.layers < layers:
        fields.pop("layer_types", None)  # transformers derives it for the new depth
        for key, value in fields.items():
            if isinstance(value, list) and len(value) == layers:  # another setting for each layer
                fields[key] = value[: verify.layers]
        fields["num_hidden_layers"] = verify.layers
        changes.append(f"layers: {verify.layers} of {layers} (verify.layers)")
    before = {key: value for key, value in fields.items() if re.search("dropout|pdrop", key)}
    fields.update(dict.fromkeys({"attention_dropout", *before}, 0.0))
    changed = ", ".join(f"{key} was {value}" for key, value in sorted(before.items()) if value)
    changes.append(f"dropout: all 0{f' ({changed})' if changed else ''}")
    changes.append(f"weights: random, of seed {config.seed}; learning rate: {verify.lr:g}, constant (verify.lr)")
    values["model"] |= {"weights": "random", "overrides": {}}
    values["optim"] |= {"lr": verify.lr, "schedule": "constant", "warmup_steps": 0, "decay_steps": None}
    values["train"] |= {"max_steps": verify.steps, "profile": {"steps": 0, "start": 0}}
    values["checkpoint"] |= {"storage_path": config.run_dir, "resume": "never"}
    values["cluster"]["max_failures"] = 0
    values["tracker"]["kind"] = "none"
    values["experiment_name"] = "verify"
    return load(values), changes


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every rank runs, as worker.run does for training."""
    from tp_trainer.data import open_data
    from tp_trainer.models.build import build_model
    from tp_trainer.parallel.mesh import build_mesh
    from tp_trainer.parallel.shard import dtypes
    from tp_trainer.session import Node
    from tp_trainer.tasks.parity import compared_steps

    config, tokenizer = load(settings["config"]), settings["tokenizer"]
    node = Node(config)
    node.agree(lambda: node.check(config, settings["launch"]))
    mesh = build_mesh(config.parallelism, node.device)
    model = node.agree(lambda: build_model(config, mesh, node.first))
    data = node.agree(lambda: open_data(
        config, tokenizer=tokenizer, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, first_on_node=node.first))  # fmt: skip
    rows = []
    with closing(model):
        for row in compared_steps(config, mesh, model, data, tokenizer):
            rows.append(row)
            if node.rank == 0:
                settings["progress"].push.remote(row)
    compute, reduce = dtypes(config.parallelism, node.device)
    return {"rows": rows, "device": node.device.type, "dtypes": [str(each).removeprefix("torch.") for each in (compute, reduce)]}


# -------------------------------------------------------------------------------------------------------- the verdict


def tolerances_for(config: Config, dtypes: Sequence[str], device: str) -> Tolerances:
    """`dtypes`: of compute and of gradient reduction."""
    full = FULL_ON_GPU if device == "cuda" else FULL
    tolerances = full if set(dtypes) == {"float32"} and not config.parallelism.float8 else REDUCED
    return dataclasses.replace(tolerances, loss=config.verify.tolerance or tolerances.loss)


def judge(rows: Sequence[Mapping[str, Any]], tolerances: Tolerances) -> list[str]:
    """What doesn't pass, a sentence each, the most telling first: gradients of step 1 before what follows from them."""
    faults = []
    if tolerances.gradient_at_step_1 is not None:
        off = {name: part for name, part in rows[0]["gradients"].items() if part > tolerances.gradient_at_step_1}
        faults += [f"step 1: the gradient of {placed(name)} differs by {part:.1e}, allowed is {tolerances.gradient_at_step_1:.0e}"
                   for name, part in sorted(off.items(), key=lambda item: -item[1])]  # fmt: skip
    for row in rows:
        for key, words, allowed in (("loss", "loss", tolerances.loss), ("gradient_norm", "gradient norm", tolerances.gradient_norm)):
            if allowed is not None and row[key]["difference"] > allowed:
                faults.append(f"step {row['step']}: the {words} differs by {row[key]['difference']:.1e}, allowed is {allowed:.0e}; "
                              f"the worst gradient there is that of {placed(worst(row['gradients'])[0])}")  # fmt: skip
        faults += [f"step {row['step']}: {placed(name)} is replicated over tp and has drifted apart" for name in row["drifted"]]
    return faults


def worst(differences: Mapping[str, float]) -> tuple[str, float]:
    return max(differences.items(), key=lambda item: item[1])


def placed(name: str) -> str:
    """A parameter's name with its layer."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return f"{name} ({f'layer {found[1]}' if found else 'outside the layers'})"


def line(row: Mapping[str, Any]) -> str:
    """A step; after each number its relative difference from the reference."""
    loss, norm = row["loss"], row["gradient_norm"]
    (gradient, off), (parameter, apart) = worst(row["gradients"]), worst(row["parameters"])
    return (f"step {row['step']:>3}  loss {loss['parallel']:.6f} ({loss['difference']:.1e})  "
            f"gradient norm {norm['parallel']:.6f} ({norm['difference']:.1e})  "
            f"worst gradient {gradient} ({off:.1e})  worst parameter {parameter} ({apart:.1e})")  # fmt: skip


def verdict(summary: Mapping[str, Any]) -> str:
    """The last lines."""
    words = {"loss": "loss", "gradient_norm": "gradient norm", "gradient_at_step_1": "each gradient at step 1"}
    rule = ", ".join(f"{words[key]} {f'<= {allowed:g}' if allowed is not None else 'not judged'}"
                     for key, allowed in summary["tolerances"].items())  # fmt: skip
    steps, head = summary["steps"], f"{summary['status']} on {summary['device']}, {'/'.join(dict.fromkeys(summary['dtypes']))}"
    seen = (f"worst seen: loss {max(row['loss']['difference'] for row in steps):.1e}, "
            f"gradient norm {max(row['gradient_norm']['difference'] for row in steps):.1e}, "
            f"gradient at step 1 {worst(steps[0]['gradients'])[1]:.1e}")  # fmt: skip
    shown = [f"  {fault}" for fault in summary["faults"][:5]]
    more = [f"  and {len(summary['faults']) - 5} more"] if len(summary["faults"]) > 5 else []
    return "\n".join([f"{head} (relative differences: {rule})", seen, *shown, *more])
