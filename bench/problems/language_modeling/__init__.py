"""Language modelling: a causal language model, to be distilled into a smaller one."""
