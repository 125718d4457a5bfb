"""The Gaussian model: rendering on CPU and GPU from one set of conventions, fitting, PLY files."""
