"""Models in other people's files: Hugging Face's checkpoints in and out, tensor by tensor."""
