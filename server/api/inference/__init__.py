"""What the Inference service does, message by message: what was asked, run, and answered."""
