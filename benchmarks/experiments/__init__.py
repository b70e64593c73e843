"""The paper's claims at a small scale: quality at equal compute, over seeds."""
