"""Data: LLaVA's rows, the pictures that they name, packed turns, encoded images, files on disk."""
