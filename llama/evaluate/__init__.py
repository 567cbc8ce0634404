"""Evaluation: what a model knows, by the tasks of lm-eval and by programs that it writes."""
