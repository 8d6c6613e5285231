"""The engine of distillbench: problems, runs, records. Importing it does not import torch."""

__version__ = "0.1.0"
