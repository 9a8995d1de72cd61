"""The other verbs than train: `task=<name>` calls `run(config)` of the module of that name."""
