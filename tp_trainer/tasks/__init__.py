"""What `task=` may name besides training: a module each, with `run(config)` that returns a summary."""
