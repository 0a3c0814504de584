"""Observing: where a run is, and the log line, progress, metrics files, plots and pages that tell of it."""
