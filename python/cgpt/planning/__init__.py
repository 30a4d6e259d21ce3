"""From a budget to a model, and from a model to a machine: what `cgpt plan` answers."""
