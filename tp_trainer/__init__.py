"""A trainer for Hugging Face language models: tensor parallel x FSDP2, started by Ray Train,
configured by Hydra.
"""

__version__ = "0.1.0"
