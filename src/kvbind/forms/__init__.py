"""How an inner loop is evaluated: recurrent, parallel, as linear attention; and the analysis of it."""
