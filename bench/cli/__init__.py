"""The command line. Commands of other packages come through the entry-point group ``distillbench.commands``.

Exit codes: 0 done; 1 a run failed or went over its budget (its record says why); 2 bad input; 3 a check failed;
4 something could not be saved; 130 interrupted.
"""
