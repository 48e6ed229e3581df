"""Number formats and the packing of weights live here; none is built yet."""
