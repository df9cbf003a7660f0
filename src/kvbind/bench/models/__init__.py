"""Whole models, each beside what a user would pick instead: training, decoding, serving, by image size and views."""
