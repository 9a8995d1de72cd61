"""The door: `python launch.py [key=value ...]`; see `python launch.py --help`."""

from tp_trainer.cli import main

if __name__ == "__main__":
    main()
