"""What a finished model is for: to classify images, and to run elsewhere."""
