from .accuracy import AccuracyReport, evaluate_accuracy


__all__ = ["AccuracyReport", "evaluate_accuracy"]
