"""Published paths of retractions."""
