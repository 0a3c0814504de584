"""One HTML page that compares runs, from what they wrote (`tools/report.py`)."""
