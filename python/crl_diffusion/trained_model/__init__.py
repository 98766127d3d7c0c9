"""What a user takes away from a run: its model, images that it draws, a folder for diffusers."""
