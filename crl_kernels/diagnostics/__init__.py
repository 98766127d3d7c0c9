"""Is rank 1 enough for this model? ``diagnose`` measures, ``Diagnosis`` is the result."""
