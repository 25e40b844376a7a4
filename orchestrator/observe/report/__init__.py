"""`report.html`, model cards, comparisons of runs, coloured tokens."""
