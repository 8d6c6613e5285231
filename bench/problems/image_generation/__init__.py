"""Image generation: a diffusion model, to be distilled into a generator of few steps."""
