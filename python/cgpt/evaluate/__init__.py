"""What a trained model is good for: held-out loss, tasks and text."""
