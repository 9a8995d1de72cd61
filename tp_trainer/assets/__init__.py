"""What comes with the package: a text to train on and a tokenizer made from its training part."""

from pathlib import Path

TEXT = Path(__file__).with_name("moby-dick.txt")
TOKENIZER = Path(__file__).with_name("tokenizer")
TOKENIZER_SIZE = 4096  # entries
