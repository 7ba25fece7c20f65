"""What every room uses: pytrees, errors, caches."""
