"""UI: the page on which a person searches an atlas and places new images in its clusters."""
