"""File formats of other programs, read and written without them."""
