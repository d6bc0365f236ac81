"""A small byte-level diffusion language model that ships with the project."""
