"""Methods, settings and presets as frozen values, without torch."""
