"""Page: the Gradio page."""
