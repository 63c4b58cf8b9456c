"""What quantization costs: part by part, with fewer bits, and the section that follows from it."""
