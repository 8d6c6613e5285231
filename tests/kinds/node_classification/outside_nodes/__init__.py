"""Node classification, as somebody outside would add it: a kind of problem, a suite and a method. distillbench knows none of them."""
