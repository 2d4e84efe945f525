"""A run as pages that a person reads: report.html and walk.html."""
