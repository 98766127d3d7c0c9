"""Methods, settings and presets as frozen values. Nothing here imports torch."""
