"""Proof that regjax and regtorch agree.

`parity_tests.harness` compares trainings, `python -m parity_tests` writes a report.
"""
