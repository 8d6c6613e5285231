"""Methods that distil a data set into a smaller one."""
