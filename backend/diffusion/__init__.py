"""Networks that make pictures by denoising, through diffusers: turntables of a subject, pictures of a text."""
