"""From prompts to batches: sampling, grading, filtering, dealing to ranks, and weights to the engine."""
