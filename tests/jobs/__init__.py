"""Programs that tests run as jobs."""
