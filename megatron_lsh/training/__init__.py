"""The training loop: what exists before it, one iteration, schedules, evaluation, orderly ends."""
