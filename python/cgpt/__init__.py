"""The thin trainer: text goes in one door, a trained GPT comes out of the other."""
