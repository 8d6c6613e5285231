"""Dataset distillation, as somebody outside would add it: a kind of problem without a teacher, a suite, a method and a control."""
