"""Reports of finished runs: tables, statistics over seeds, pictures, one page."""
