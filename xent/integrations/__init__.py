"""The losses inside other libraries: one module for each, imported by nothing but its user."""
