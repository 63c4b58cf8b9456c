"""Data sets as labelled batches of uint8 images, and what is done to images before a network sees them."""
