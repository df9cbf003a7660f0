"""Tables 1 and 2 of the paper: what a table is, its rows, its verdicts, its words and its plots."""
