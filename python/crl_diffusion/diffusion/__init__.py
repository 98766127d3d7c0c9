"""The diffusion model: noising, network, precision, sampling."""
