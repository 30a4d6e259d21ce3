"""Layers whose weights can live anywhere: where they live (placement), what they are (store), the walk (executor)."""
