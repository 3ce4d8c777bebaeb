"""Settings code and the YAML a person edits. `settings` reads it; kinds of jobs are read by `coordination.kinds`."""
