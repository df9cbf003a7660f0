"""`kvbind plan`: memory, communication and time of training on any number of GPUs, from formulas and measured points."""
