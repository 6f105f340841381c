"""Nearest reproductions: of lattices, codebooks and pyramids, and Viterbi for trellises."""
