"""Measures as `evaluate.Metric` modules: import a class, or `evaluate.load` the path of a file, offline too."""
