"""How a run goes on after it was stopped: the journal, the folder, what is written layer by layer.

Start at `journal.py`.
"""
