"""One training run: what the trainers' loops call, and what a run leaves on disk."""
