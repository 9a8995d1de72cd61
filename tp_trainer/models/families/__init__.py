"""One record a family: all that the product knows of it. Where transformers' plan says all, there
is none.

`model.family=package.module:name` brings one from outside, made of `Family` and `Role`.
"""

from __future__ import annotations

from tp_trainer.config import ConfigError, Model, imported
from tp_trainer.models.families import (
    cohere,
    gemma,
    glm,
    granite,
    latent,
    olmo,
    phi,
    plain,
    recurrent,
    smollm3,
)
from tp_trainer.models.families.family import COMMON, HARMLESS, Family, Projection
from tp_trainer.parallel.tensor import Role

RECORDS = {
    each.model_type: each
    for module in (cohere, gemma, glm, granite, latent, olmo, phi, plain, recurrent, smollm3)
    for each in vars(module).values()
    if isinstance(each, Family)
}


def family_of(model: Model) -> Family:
    """The record of the chosen model's family: the one that `model.family` names, or ours.

    Raises:
        ConfigError: `model.family` names none, or that of another family.
    """
    model_type, reference = str(model.architecture["model_type"]), model.family
    if reference is None:
        return RECORDS.get(model_type, Family(model_type))
    found = _imported(reference)
    if not isinstance(found, Family):
        kind = type(found).__name__
        raise ConfigError(
            "model.family", reference, f"is of type {kind}, not a tp_trainer.models.families.Family"
        )
    if found.model_type != model_type:
        raise ConfigError(
            "model.family",
            reference,
            f"is the record of {found.model_type}, and the model's model_type is {model_type}",
        )
    return found


def _imported(reference: str) -> object:
    """What `package.module:name` names. Raises ConfigError."""
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ConfigError("model.family", reference, "must be package.module:name")
    try:
        return imported(reference)
    except Exception as error:  # whatever importing a user's module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            "model.family",
            reference,
            f"can't be imported ({reason}); it must lie in the working directory or on PYTHONPATH,"
            " on every node",
        ) from error


__all__ = ["COMMON", "HARMLESS", "RECORDS", "Family", "Projection", "Role", "family_of"]
