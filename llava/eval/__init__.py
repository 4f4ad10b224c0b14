"""Evaluation: one question from the shell, a file of questions in LLaVA's format, and reports of accuracy against cost."""
