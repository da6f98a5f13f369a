"""Alembic migrations; `embstore db upgrade` runs them."""
