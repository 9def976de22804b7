"""Rounds of rows in, log-probabilities out: the layout of one packed forward, and the scorer that runs it."""

from .scorer import Scorer, Scores


__all__ = ["Scorer", "Scores"]
