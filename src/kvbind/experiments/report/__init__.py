"""The report: a page on each result, and one on all of them, with charts and models to look into."""
