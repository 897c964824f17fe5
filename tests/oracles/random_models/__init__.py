"""Seeded random models of transformers in every family, and their files, for tests against Kvik."""
