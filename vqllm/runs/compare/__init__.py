"""Several recipes on one model: which members there are, their runs, what came out, the ranking."""
