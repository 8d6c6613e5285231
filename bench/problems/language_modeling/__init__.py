"""Language modelling: a causal language model, to be distilled into a smaller one."""

VERSION = 2  # raised when results of this kind of problem may change: part of every identity
