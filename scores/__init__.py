"""What is measured of reconstructions and of new brains."""
