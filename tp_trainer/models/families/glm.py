"""GLM and GLM-4: gate and up projection of the MLP in one linear."""

from __future__ import annotations

from typing import Any

from tp_trainer.models.families.family import Family
from tp_trainer.parallel.tensor import Role

FUSED_MLP: dict[str, Any] = {
    "roles": {"layers.*.mlp.down_proj": Role.ROW},
    "fused": {"layers.*.mlp.gate_up_proj": ("inner", "inner")},
}
GLM = Family("glm", **FUSED_MLP)
GLM4 = Family("glm4", **FUSED_MLP)
