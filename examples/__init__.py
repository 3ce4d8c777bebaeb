"""Programs to run as jobs. `selfplay` is a pipeline of them: self-play, evaluation and tournaments of board games.

The orchestrator does not import anything from here; it starts these programs as it would start yours.
"""
