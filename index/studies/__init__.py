"""Studies: how well an atlas retrieves, and what is in it twice."""
