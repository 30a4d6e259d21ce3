"""What a trained model is good for: held-out loss and text."""
