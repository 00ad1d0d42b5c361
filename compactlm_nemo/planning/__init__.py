"""What a run will need and take: its own code, run on tensors that have shapes and no memory."""
