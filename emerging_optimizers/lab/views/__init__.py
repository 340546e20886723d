"""What the experiments show: each figure and each table, described once, as data.

`describe.py` has the words; a file for each experiment turns its result into a `View`. matplotlib (``plots.py``), the
page of the report (``page.py``), the terminal and Markdown draw the same description.
"""
