"""Records, Protocols, errors and files on disk that all rooms share. It imports the standard library and
numpy."""
