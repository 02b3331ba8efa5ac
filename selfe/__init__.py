"""Self-E: text-to-image models trained from scratch that sample in any number of steps (arXiv 2512.22374)."""
