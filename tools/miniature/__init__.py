"""The recipe of the bundled miniature: draw a world, train a small latent diffusion model on it, measure, export."""
