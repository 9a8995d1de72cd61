"""OLMo: layer norms without weights. OLMo 2 and 3: one norm over the queries of all heads, and one
over the keys.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family
from tp_trainer.parallel.tensor import Role

SPANNING = {
    "layers.*.self_attn.q_proj": Role.COLUMN,
    "layers.*.self_attn.k_proj": Role.COLUMN,
    "layers.*.self_attn.v_proj": Role.COLUMN,
    "layers.*.self_attn.o_proj": Role.ROW,
    "layers.*.self_attn.q_norm": Role.NORM,
    "layers.*.self_attn.k_norm": Role.NORM,
}
OLMO = Family("olmo", honoured=frozenset({"clip_qkv"}))
OLMO2 = Family("olmo2", roles=SPANNING)
OLMO3 = Family("olmo3", roles=SPANNING)
