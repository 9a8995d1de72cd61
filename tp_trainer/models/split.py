"""The split table: what each module of a model is to tensor parallelism, and so how each parameter lies over tp.

Derived from the plan that transformers keeps beside each family (`base_model_tp_plan`), completed for what that plan
leaves out: token embedding, head, the regions between them, and which replicated gradients are parts of a sum.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from tp_trainer.config import ConfigError
from tp_trainer.parallel.tensor import Role, split_dim

PLAN = {"colwise": Role.COLUMN, "rowwise": Role.ROW, "replicated_with_grad_allreduce": Role.PER_HEAD}


def split_table(model: PreTrainedModel) -> dict[str, Role]:
    """Full module name -> role, for every module that has one.

    Raises:
        ConfigError: the family has no plan, or one that the table can't serve.
    """
    family = model.config.model_type
    plan = getattr(model.config, "base_model_tp_plan", None)
    if not plan:
        raise ConfigError("model.architecture.model_type", family, "transformers has no tensor-parallel plan for this family")
    unknown = sorted(set(plan.values()) - set(PLAN))
    if unknown:
        raise ConfigError("model.architecture.model_type", family,
                          f"its tensor-parallel plan uses {', '.join(unknown)}, which is not supported")
    modules = dict(model.named_modules())
    prefix = model.base_model_prefix + "."
    roles: dict[str, Role] = {}
    for name in modules:
        style = plan.get(_starred(name.removeprefix(prefix)))
        if style is not None:
            roles[name] = PLAN[style]
            if roles[name] is Role.COLUMN:
                roles[name.rpartition(".")[0]] = Role.REGION
    names = {id(module): name for name, module in modules.items()}
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError("model.architecture.model_type", family, "its output projection has a bias, which is not supported")
    roles[names[id(model.get_input_embeddings())]] = Role.EMBEDDING
    roles[names[id(head)]] = Role.HEAD
    return roles


def is_gradient_summed(name: str, roles: dict[str, Role], sequence_parallel: bool) -> bool:
    """Whether each tp rank's gradient of this parameter is one part of a sum over the TP group.

    Under sequence parallelism every replicated parameter has seen this rank's part of the sequence only; without, only
    those applied to this rank's heads have seen a part.
    """
    module, _, key = name.rpartition(".")
    role = roles.get(module)
    if split_dim(role, key) is not None:
        return False
    return sequence_parallel or role is Role.PER_HEAD


def _starred(name: str) -> str:
    """layers.3.mlp.up_proj -> layers.*.mlp.up_proj, as transformers' plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
