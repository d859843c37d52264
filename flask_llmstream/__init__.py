"""Stream language-model tokens from a Flask app."""
