"""Steering measured: what a reply says and how it says it, and protocols that compare methods on held-out questions.

It reads texts with transparent measures (:mod:`~prefmw.evaluation.oracles`, :mod:`~prefmw.evaluation.content`) and runs
replies through the same plan and engine as a user's turn.
"""
