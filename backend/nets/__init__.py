"""Networks that compare or judge pictures; those that make them are in `diffusion`."""
