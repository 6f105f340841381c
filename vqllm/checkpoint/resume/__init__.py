"""How a stopped run goes on: its journal, its folder, and the layers that it has written.

Start at `journal.py`.
"""
