"""Image generation: a diffusion model, to be distilled into a generator of few steps."""

VERSION = 2  # raised when results of this kind of problem may change: part of every identity
