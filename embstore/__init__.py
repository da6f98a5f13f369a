"""An embedding store on PostgreSQL and pgvector."""
