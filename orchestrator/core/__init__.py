"""What every room speaks: records that flow, Protocols, errors, files on disk, faults. Standard library and
numpy only."""
