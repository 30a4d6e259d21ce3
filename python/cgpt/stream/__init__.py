"""Layers whose weights can live anywhere: where they live (placement), what they are (store), the walk (executor)."""


def __getattr__(name: str):
    """`Streamed`, whose torch the command line does without until it is needed."""
    if name == "Streamed":
        from cgpt.stream.streamed import Streamed

        return Streamed
    raise AttributeError(f"module {__name__} has no attribute {name}")
