"""What is measured of generated images: features, FID, forgetting."""
