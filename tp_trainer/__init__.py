"""A trainer for Hugging Face language models: tensor parallel x FSDP2, started by Ray Train,
configured by Hydra.
"""

import os
import sys

__version__ = "0.1.0"

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Whether this package is found only because launch.py lies beside it: Python puts the directory of
# its script first. Last it does as well, and what else lies there shadows no module.
BESIDE_SCRIPT = sys.path[:1] == [ROOT] and ROOT not in sys.path[1:]
if sys.path[:1] == [ROOT]:
    del sys.path[0]
    if BESIDE_SCRIPT:
        sys.path.append(ROOT)
