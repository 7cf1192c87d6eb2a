"""Other people's protocols on our port: each file a translation to ``tidegate.v1`` and back, no more."""
