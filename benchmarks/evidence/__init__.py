"""The experiments behind the claims: what is run, how lambda is chosen, what is kept of each run, and the reports."""
